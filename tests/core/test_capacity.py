"""Who runs and who waits, and what a search is expected to need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ets.core.capacity import Need, NeedEstimates, SearchQueue
from sglang_ets.core.config import SearchConfig

POOLS = Need(100, 100)


def same(tokens: int) -> Need:
    return Need(tokens, tokens)


def make_queue(**kwargs: int) -> SearchQueue:
    return SearchQueue(POOLS, **{"max_waiting": 4, **kwargs})


def test_searches_start_in_order_of_arrival_as_long_as_they_fit() -> None:
    queue = make_queue()
    for name in ("a", "b", "c"):
        assert queue.enter(name, same(45))
    assert queue.start() == ["a", "b"]
    assert queue.start() == []
    queue.leave("a")
    assert queue.start() == ["c"]
    assert queue.running == ["b", "c"]


def test_a_small_search_does_not_overtake_a_large_one() -> None:
    queue = make_queue()
    for name, tokens in (("a", 60), ("large", 90), ("small", 10)):
        queue.enter(name, same(tokens))
    assert queue.start() == ["a"]


def test_a_higher_priority_goes_first() -> None:
    queue = make_queue()
    queue.enter("a", same(90))
    queue.enter("b", same(90), priority=1)
    assert queue.start() == ["b"]


@pytest.mark.parametrize("need", [Need(101, 1), Need(1, 101)])
def test_one_search_always_runs_alone_and_each_pool_counts(need: Need) -> None:
    queue = make_queue()
    queue.enter("a", need)
    queue.enter("b", Need(1, 1))
    assert queue.start() == ["a"]


def test_the_bound_of_waiting_searches_holds_and_a_search_that_can_start_needs_no_place() -> None:
    queue = make_queue(max_waiting=0)
    assert queue.enter("a", same(50))
    assert queue.start() == ["a"]
    assert queue.enter("b", same(50))
    assert queue.start() == ["b"]
    assert not queue.enter("c", same(50))
    queue.leave("a")
    assert queue.enter("d", same(50))


def test_max_running() -> None:
    queue = make_queue(max_running=1)
    queue.enter("a", same(1))
    queue.enter("b", same(1))
    assert queue.start() == ["a"]


def test_the_youngest_gives_way_and_goes_on_before_those_who_wait() -> None:
    queue = make_queue()
    for name in ("a", "b", "c"):
        queue.enter(name, same(50))
    queue.start()
    assert queue.suspend() == "b"
    assert queue.suspend() is None, "the last one has nobody to give way to"
    assert (queue.num_suspended, queue.num_waiting) == (1, 1)
    queue.leave("a")
    assert queue.start() == ["b", "c"]


def test_who_gave_way_waits_for_an_end_even_if_the_estimates_would_let_it_go_on() -> None:
    queue = make_queue()
    for name in ("a", "b", "c"):
        queue.enter(name, same(1))
    queue.start()
    assert (queue.suspend(), queue.suspend()) == ("c", "b")
    queue.enter("d", same(1))
    assert queue.start() == [], "nor does a younger one overtake them"
    queue.leave("d")
    assert queue.start() == [], "what never ran makes no room"
    queue.leave("a")
    assert queue.start() == ["b", "c"]


def test_a_search_that_holds_more_than_expected_keeps_others_waiting() -> None:
    queue = make_queue()
    queue.enter("a", same(10))
    queue.start()
    queue.update("a", Need(80, 5))
    queue.enter("b", same(30))
    assert queue.start() == []
    queue.update("unknown", same(100))  # it has ended meanwhile
    queue.leave("a")
    assert queue.start() == ["b"]


def test_estimates_are_cautious_before_anything_was_seen_and_learned_afterwards() -> None:
    estimates = NeedEstimates()
    config = SearchConfig(algorithm="rebase", width=8, max_tokens=100, max_step_tokens=10)
    prompt = Need(7, 9)
    assert estimates.estimate(config, prompt) == Need(7 + 8 * 40, 9 + 8 * 40)
    for policy in (80, 160, 160, 240):
        estimates.observe(config, Need(10, 10), Need(10 + policy, 10 + 2 * policy))
    wider = SearchConfig(algorithm="rebase", width=16, max_tokens=100, max_step_tokens=10)
    assert estimates.estimate(wider, prompt) == Need(7 + 16 * 30, 9 + 16 * 60)
    other = SearchConfig(algorithm="ets", width=8, max_tokens=20, max_step_tokens=10)
    assert estimates.estimate(other, prompt) == Need(7 + 8 * 20, 9 + 8 * 20)


@given(
    st.lists(st.tuples(st.sampled_from(["enter", "start", "suspend", "leave"]), st.integers(0, 9), st.integers(1, 120)))
)
def test_nobody_is_lost_or_runs_twice_and_somebody_runs_while_anybody_is_there(
    steps: list[tuple[str, int, int]],
) -> None:
    queue = make_queue()
    present: set[str] = set()
    for action, number, tokens in steps:
        name = str(number)
        if action == "enter" and name not in present and queue.enter(name, same(tokens)):
            present.add(name)
        elif action == "leave":
            queue.leave(name)
            present.discard(name)
        elif action == "suspend":
            queue.suspend()
        queue.start() if action == "start" else None
        total = len(queue.running) + queue.num_suspended + queue.num_waiting
        assert total == len(present) == len(present | set(queue.running))
        assert queue.num_waiting <= queue.max_waiting
    queue.start()
    assert bool(queue.running) == bool(present)
