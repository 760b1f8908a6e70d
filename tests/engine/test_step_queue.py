"""Children enter the engine in order, behind ordinary requests, and as far as rows are left."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sglang_ets.engine.step_queue import StepQueue, rows_for_children


@dataclass
class FakeReq:
    rid: str


class NoForks:
    """Every child goes through sglang's queue."""

    def room(self) -> None:
        return None

    def admits(self, _child: FakeReq, _room: None) -> bool:
        return False


@dataclass
class FakeScheduler:
    waiting_queue: list[FakeReq]


def filled(queue: StepQueue, owner: str, count: int) -> list[FakeReq]:
    children = [FakeReq(f"{owner}{i}") for i in range(count)]
    for child in children:
        queue.add(owner, child)
    return children


def ids(waiting: list[FakeReq]) -> list[str]:
    return [req.rid for req in waiting]


def test_the_first_search_goes_first_and_rows_limit_all() -> None:
    waiting: list[FakeReq] = []
    queue = StepQueue(FakeScheduler(waiting), 3, NoForks())
    filled(queue, "b", 2)
    filled(queue, "a", 2)
    queue.feed(["a", "b"])
    assert ids(waiting) == ["a0", "a1", "b0"]
    assert (queue.num_inside, len(queue.pending("b"))) == (3, 1)
    queue.left("a0")
    queue.left("a0")
    waiting.pop(0)
    queue.feed(["a", "b"])
    assert ids(waiting) == ["a1", "b0", "b1"]


def test_an_ordinary_request_goes_before_children_that_wait() -> None:
    waiting: list[FakeReq] = []
    queue = StepQueue(FakeScheduler(waiting), 8, NoForks())
    filled(queue, "a", 2)
    queue.feed(["a"])
    waiting.append(FakeReq("ordinary"))
    queue.feed(["a"])
    assert ids(waiting) == ["ordinary", "a0", "a1"]


def test_an_older_search_goes_before_children_of_a_younger_one_that_wait_already() -> None:
    waiting: list[FakeReq] = []
    queue = StepQueue(FakeScheduler(waiting), 8, NoForks())
    filled(queue, "young", 2)
    queue.feed(["old", "young"])
    filled(queue, "old", 1)
    queue.feed(["old", "young"])
    assert ids(waiting) == ["old0", "young0", "young1"]


def test_a_suspended_search_takes_back_what_waits_and_keeps_its_order() -> None:
    waiting: list[FakeReq] = []
    queue = StepQueue(FakeScheduler(waiting), 3, NoForks())
    filled(queue, "a", 4)
    queue.feed(["a"])
    running = waiting.pop(0)
    waiting.insert(0, FakeReq("ordinary"))
    assert queue.withdraw("a") == 2
    assert ids(waiting) == ["ordinary"]
    assert queue.num_inside == 1, "the one that runs stays"
    queue.feed([])
    assert ids(waiting) == ["ordinary"], "a search that is not in the order does not run"
    queue.left(running.rid)
    queue.feed(["a"])
    assert ids(waiting) == ["ordinary", "a1", "a2", "a3"]


def test_an_ended_search_forgets_what_has_not_entered() -> None:
    waiting: list[FakeReq] = []
    queue = StepQueue(FakeScheduler(waiting), 1, NoForks())
    children = filled(queue, "a", 3)
    queue.feed(["a"])
    assert queue.discard("a") == children[1:]
    assert queue.discard("a") == []
    queue.left("a0")
    waiting.clear()
    queue.feed(["a"])
    assert waiting == []


@pytest.mark.parametrize(
    ("rows", "wanted", "expected"), [(64, None, 56), (64, 10, 10), (64, 100, 56), (4, None, 3), (1, None, 1)]
)
def test_some_rows_are_kept_for_ordinary_requests(rows: int, wanted: int | None, expected: int) -> None:
    assert rows_for_children(rows, wanted) == expected


def test_what_nobody_wants_leaves_both_queues_and_frees_its_rows() -> None:
    waiting: list[FakeReq] = []
    queue = StepQueue(FakeScheduler(waiting), 3, NoForks())
    filled(queue, "a", 4)
    filled(queue, "b", 1)
    assert (queue.num_free, queue.num_pending) == (-2, 5)
    queue.feed(["a", "b"])
    assert (queue.num_free, queue.num_pending, queue.num_inside) == (-2, 2, 3)
    assert queue.remove("a", {"a1", "a3", "b0"}) == ["a3", "a1"]
    assert (ids(waiting), queue.pending("a"), ids(list(queue.pending("b")))) == (["a0", "a2"], (), ["b0"])
    assert (queue.num_free, queue.num_pending, queue.num_inside) == (0, 1, 2)
    assert queue.remove("a", {"a1"}) == queue.remove("c", {"c0"}) == []
