"""The wiring without a server: a search from its prompt to its one answer, and every way that it can go wrong.

Each test ends balanced: no lock in either cache, no internal request, no token of KV that nobody accounts for.
"""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang_ets.patches.scheduler import bound_queue

from sglang_ets.core.registry import BUILT_IN
from sglang_ets.core.search import Search
from sglang_ets.core.selection import Level, Rebase, Selection
from sglang_ets.core.tree import Node, SearchTree
from sglang_ets.engine.children import ChildReq
from sglang_ets.engine.live import Branch, LiveSearch
from sglang_ets.engine.metrics import NoMetrics
from sglang_ets.engine.pressure import HOPELESS_TICKS
from sglang_ets.kv import Hold, LedgerImbalance, RadixLedger
from sglang_ets.prm.steps import PrmError
from sglang_ets.wire import PROGRESS_KEY, QUESTION_KEY, TRACE_KEY, TRACE_PARAM
from tests.engine.fakes import (
    DELIMITER,
    EOS,
    VOCAB,
    FakeBatch,
    FakeScheduler,
    ScriptedPath,
    ScriptedPrm,
    World,
    given,
    request,
    three_steps,
    tokens,
)

ALGORITHMS = tuple(BUILT_IN)
WIDTH = 4


@pytest.fixture(autouse=True)
def no_error_in_the_log(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The guard turns a defect of the wiring into a failed search and a line in the log: only planted ones may show there."""
    yield
    if not any(word in request.node.name for word in ("_bug_", "_raises_")):
        assert [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []


def emoji_steps(child: ChildReq) -> Sequence[int]:
    """One text without an end, which the token limit cuts anywhere."""
    text = "🙂 3 € → 我们 👍🏽 "
    begun = len(given(child)) - len(child.spec.parent.origin_input_ids)
    return (tokens(text * 8))[begun:]


def answered_tree(world: World, **settings: Any) -> dict[str, Any]:
    world.ask(return_tree=True, n=WIDTH, **settings)
    world.run()
    return world.answer()


# ---- a search that goes well ----


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "subpool"])  # whose levels mix depths
def test_prompt_levels_and_finish(algorithm: str) -> None:
    world = World()
    result = answered_tree(world, algorithm=algorithm)
    world.assert_balanced()
    figures, nodes = result["search"], result["tree"]["nodes"]
    assert (figures["finish_reason"], figures["levels"], figures["warnings"]) == ("complete", 3, [])
    assert figures["id"] == "pa"
    assert len(nodes) == 3 * WIDTH  # the width is given to steps of each level
    assert {node["depth"] for node in nodes if node["state"] == "complete"} == {3}
    assert sum(node["state"] == "complete" for node in nodes) == WIDTH
    assert all(node["score"] is not None for node in nodes)
    assert world.prm.questions == ["Q: 1+1?\n"]
    assert result["usage"]["completion_tokens"] == sum(len(node["token_ids"]) for node in nodes)
    # Every answer is a path of the tree.
    by_id = {node["id"]: node for node in nodes}
    texts = set()
    for node in nodes:
        if node["state"] == "complete":
            text, at = "", node
            while at is not None:
                text, at = at["text"] + text, by_id.get(at["parent"])
            texts.add(text)
    assert {answer["text"] for answer in result["results"]} <= texts
    assert result["results"][0]["score"] == max(answer["score"] for answer in result["results"])


def test_what_is_pruned_frees_its_kv_before_the_next_level() -> None:
    world = World()
    result = answered_tree(world, algorithm="beam")
    assert result["search"]["nodes_pruned"] == 2 * (WIDTH - 2)
    assert all(level["retained"] < level["held"] for level in result["search"]["kv_levels"][:2])
    assert world.ets.ledger.freed_tokens > 0
    world.assert_balanced()


def test_two_searches_and_ordinary_requests_share_a_scheduler() -> None:
    world = World()
    world.ask("a", algorithm="ets")
    world.ask("b", algorithm="dvts", seed=2)
    world.ask("plain", search=False, max_new_tokens=4)
    world.run()
    assert world.answer("a")["search"]["seed"] == 1
    assert world.answer("b")["search"]["seed"] == 2
    assert [sent.finished for sent in world.scheduler.output_streamer.responses("plain")] == [
        {"type": "length", "length": 4}
    ]
    assert max(len(batch) for batch in world.prm.batches) > WIDTH  # steps of both in one call of the PRM
    world.assert_balanced()


def uneven_steps(child: ChildReq) -> Sequence[int]:
    """Steps of 1 to 5 words, many of which are equal, and EOS after any of them: all by the child's seed."""
    rng = random.Random(child.sampling_params.sampling_seed)
    words = " ".join(rng.choice(["a", "b"]) for _ in range(rng.randint(1, 5)))
    return tokens(words, ends=True) if rng.random() < 0.2 else tokens(f"{words}{DELIMITER}")


def scheduled(order: int | None, *, caches_last_token: bool = False, tokens_per_tick: int = 10_000) -> FakeScheduler:
    """A scheduler in which steps are ready in another order for each `order`; None: as they come."""
    scheduler = FakeScheduler(uneven_steps, tokens_per_tick=tokens_per_tick)
    scheduler.caches_last_token = caches_last_token
    if order is not None:
        rng = random.Random(order)
        scheduler.holds_back = lambda child: rng.random() < 0.5
    return scheduler


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("width", [4, 16])
def test_the_same_seed_grows_the_same_tree_in_whatever_order_steps_are_ready(algorithm: str, width: int) -> None:
    def grown(scheduler: FakeScheduler) -> Any:
        world = World(scheduler)
        world.ask(return_tree=True, n=width, search_width=width, algorithm=algorithm)
        world.run()
        world.assert_balanced()
        result = world.answer()
        return result["tree"], result["results"]

    tree = grown(scheduled(None))
    assert max(node["depth"] for node in tree[0]["nodes"]) > 2
    assert grown(scheduled(None, caches_last_token=True)) == tree
    for order in range(3):
        assert grown(scheduled(order, tokens_per_tick=3, caches_last_token=order == 1)) == tree


def test_a_stream_gets_a_report_a_level_and_one_answer_that_begins_with_it() -> None:
    world = World(FakeScheduler(lambda child: tokens("same\n") if len(given(child)) < 12 else three_steps(child)))
    world.ask(stream=True, algorithm="beam", custom={TRACE_PARAM: True})
    world.run()
    reports = world.scheduler.output_streamer.reports("pa")
    assert [report[PROGRESS_KEY]["level"] for report in reports] == [1, 2]
    assert reports[0][PROGRESS_KEY]["text"] == "same\n"
    assert [report[TRACE_KEY]["part"] for report in reports] == [1, 2]
    assert world.answer()["results"][0]["text"].startswith(reports[1][PROGRESS_KEY]["text"])
    world.assert_balanced()


@pytest.mark.parametrize("step_tokens", [1, 2, 3, 5, 7])
def test_steps_cut_inside_characters_join_to_the_text_of_the_tokens(step_tokens: int) -> None:
    world = World(FakeScheduler(emoji_steps))
    world.ask(
        stream=True, algorithm="rebase", max_step_tokens=step_tokens, max_steps=12, max_new_tokens=31, return_tree=True
    )
    world.run()
    best = world.answer()["results"][0]
    assert best["text"] == bytes(best["token_ids"]).decode("utf-8", "replace")
    texts = [report[PROGRESS_KEY]["text"] for report in world.scheduler.output_streamer.reports("pa")]
    assert texts
    for text in texts:
        assert best["text"].startswith(text)
        assert "\ufffd" not in text
    world.assert_balanced()


def test_an_answer_ends_before_the_stop_of_the_client() -> None:
    world = World(FakeScheduler(lambda child: tokens("42 END and more")))
    world.ask(stop=["END"], return_tree=True)
    world.run()
    best = world.answer()["results"][0]
    assert (best["text"], best["finish_reason"]) == ("42 ", "stop")
    world.assert_balanced()


# ---- admission ----


def test_other_requests_are_left_to_sglang() -> None:
    world = World()
    assert not world.ets.admit(request("plain", "x", search=False), False)
    assert not world.ets.admit(request("again", "x"), True)
    gone = request("gone", "x")
    gone.to_finish = object()
    assert not world.ets.admit(gone, False)
    assert world.scheduler.output_streamer.sent == []


@pytest.mark.parametrize(
    ("search", "named"),
    [
        ({"search_width": 1}, "search_width must be"),
        ({"search_width": 300}, "search_width must be at most 256"),
        ('{"width": 300}', "search_width must be at most 256"),
        ("[" * 100_000, "search settings must be at most"),
        ({"search_width": 4, "answer_pattern": "("}, "answer_pattern must be"),
        (7, "custom_params['ets'] must be an object of settings, got 7; for example"),
        ({"search_width": 4, "step_delimiter": [10**6]}, "step_delimiter must be texts or token ids below 257"),
    ],
)
def test_a_wrong_search_is_refused_with_one_sentence(search: Any, named: str) -> None:
    world = World()
    world.ask(search=search)
    (sent,) = world.scheduler.output_streamer.responses("pa")
    assert sent.finished is not None
    assert sent.finished["message"].startswith(named), "with what the client sent, wherever it stood"
    assert sent.finished["status_code"] == 400
    assert "\n" not in sent.finished["message"]
    world.assert_balanced()


def test_what_cannot_fit_or_has_no_prompt_is_refused() -> None:
    world = World(FakeScheduler(pool_tokens=100))
    world.ask("large", max_new_tokens=200)
    assert "need 209 KV tokens" in world.error("large")
    world.ask("empty", prompt="")
    assert "at least one token" in world.error("empty")
    world.ask("question", custom={QUESTION_KEY: 5})
    assert "must be text of at most" in world.error("question")
    assert world.ets.describe()["failed"] == 2  # the third was no search yet
    world.assert_balanced()


def test_a_priority_that_sglang_refuses_is_left_to_it() -> None:
    world = World()
    world.scheduler.has_valid_priorities = False
    world.ask()
    assert world.scheduler.released == ["pa"]
    world.assert_balanced()


def test_a_search_of_a_text_is_clipped_to_the_room_that_sglang_leaves() -> None:
    world = World(FakeScheduler(lambda child: tokens("x" * 300)))
    world.ask(
        search='{"width": 4, "max_tokens": 250, "max_step_tokens": 250, "algorithm": "rebase"}', max_new_tokens=30
    )
    world.run()
    assert len(world.answer()["results"][0]["token_ids"]) == 30
    world.assert_balanced()


# ---- faults ----


def test_a_prm_that_raises_fails_the_search_and_not_the_server() -> None:
    def broken(_job: Any) -> float:
        raise ZeroDivisionError("no PRM today")

    world = World(prm=ScriptedPrm(broken))
    world.ask()
    world.run()
    assert world.error() == (
        "search failed: 4 of the 4 steps of level 1 failed, more than half: ZeroDivisionError: no PRM today"
    )
    world.assert_balanced()
    world.prm.score_of = lambda job: 0.5
    world.ask("next")
    world.run()
    assert world.answer("next")["search"]["warnings"] == []
    world.assert_balanced()


def lossy_prm(num_lost: int, at_depth: int) -> ScriptedPrm:
    """Loses the first `num_lost` steps of one depth."""
    lost: list[int] = []

    def score(job: Any) -> float | PrmError:
        if job.depth == at_depth and len(lost) < num_lost:
            lost.append(job.depth)
            return PrmError(f"the pool has {len(lost)} tokens left")
        return len(job.step_text) / 100

    return ScriptedPrm(score)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "best_of_n"])
def test_half_a_level_may_be_lost_and_the_answer_says_so(algorithm: str) -> None:
    world = World(prm=lossy_prm(WIDTH // 2, 2))
    world.ask(algorithm=algorithm)
    world.run()
    figures = world.answer()["search"]
    assert figures["warnings"] == [f"2 of {figures['nodes_made']} steps failed: the pool has 1 tokens left"]
    assert figures["nodes_failed"] == 2
    world.assert_balanced()


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "best_of_n"])
def test_more_than_half_a_level_lost_is_an_error(algorithm: str, caplog: pytest.LogCaptureFixture) -> None:
    world = World(prm=lossy_prm(WIDTH // 2 + 1, 2))
    world.ask(algorithm=algorithm)
    world.run()
    assert world.error().startswith("search failed: 3 of the 4 steps of level 2 failed, more than half: the pool has 1")
    world.assert_balanced()
    assert not any(record.exc_info for record in caplog.records)  # what else the level wanted was not tried


class CountingPrm(ScriptedPrm):
    """At the end of a search it looks at its locks, as the real one does."""

    def end_owner(self, owner: str) -> None:
        super().end_owner(owner)
        if self.locked:
            raise LedgerImbalance(f"search {owner} ended with {len(self.locked)} locks; expected 0")


def test_a_search_that_fails_in_a_round_of_scoring_gives_all_its_locks_back_before_they_are_counted() -> None:
    """Its last child waits in the queue and leaves at once: the search is over before the other scores are taken in."""
    score = iter([PrmError("too long"), *[0.5] * 15])
    world = World(prm=CountingPrm(lambda _job: next(score)))
    world.scheduler.holds_back = lambda child: child.node_id == 17
    world.ask(algorithm="best_of_n", search_width=17)
    world.run()
    assert "too long" in world.error()
    world.assert_balanced()


def test_a_step_of_best_of_n_that_was_continued_and_gets_no_score_fails_the_search() -> None:
    world = World(prm=lossy_prm(1, 1))
    world.ask(algorithm="best_of_n")
    world.run()
    assert world.error() == "search failed: the pool has 1 tokens left"
    world.assert_balanced()


def test_a_last_step_of_best_of_n_without_a_score_ends_its_trajectory_alone() -> None:
    world = World(prm=lossy_prm(1, 3))
    world.ask(algorithm="best_of_n", n=WIDTH)
    world.run()
    result = world.answer()
    assert result["search"]["nodes_failed"] == 1
    assert sum(answer["finish_reason"] == "stop" for answer in result["results"]) == WIDTH - 1
    world.assert_balanced()


def test_a_search_that_fails_in_a_round_of_scoring_takes_its_waiting_steps_along() -> None:
    """Seen on a server: best_of_n with a PRM pool of 700 tokens, KeyError outside the guard."""
    world = World(prm=lossy_prm(1, 1))
    world.ask("fails", algorithm="best_of_n", search_width=20)
    world.ask("goes on", algorithm="rebase", search_width=20)
    world.run()
    assert "search failed" in world.error("fails")
    assert world.answer("goes on")["search"]["warnings"] == []
    world.assert_balanced()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_child_aborted_while_it_waits_fails_alone(algorithm: str) -> None:
    world = World()
    world.ask(algorithm=algorithm)
    world.scheduler.tick()  # the prompt
    world.scheduler.holds_back = lambda _child: True
    world.scheduler.tick()  # the first level waits
    world.scheduler.holds_back = lambda _child: False
    (first, *_) = [req for req in world.scheduler.waiting_queue if isinstance(req, ChildReq)]
    world.scheduler.abort_request(AbortReq(rid=first.rid))
    world.run()
    assert world.scheduler.aborted == []  # the tokenizer manager does not know the child
    figures = world.answer()["search"]
    assert figures["warnings"] == [f"1 of {figures['nodes_made']} steps failed: aborted while it waited"]
    world.assert_balanced()


def test_a_child_aborted_by_its_id_takes_no_sibling_and_no_other_request_along() -> None:
    """As sglang does after SGLANG_REQ_WAITING_TIMEOUT. The ids of nodes 10 to 12 begin as that of node 1."""
    world = World()
    world.ask(algorithm="rebase", search_width=12)
    world.scheduler.tick()  # the prompt
    world.scheduler.holds_back = lambda _child: True
    world.scheduler.add(plain := request("plain", "x", search=False, max_new_tokens=5))
    world.scheduler.tick()  # the first level waits
    world.scheduler.holds_back = lambda _child: False
    (first, *others) = [req for req in world.scheduler.waiting_queue if isinstance(req, ChildReq)]
    world.scheduler.abort_request(AbortReq(rid=first.rid))
    assert others == [req for req in world.scheduler.waiting_queue if isinstance(req, ChildReq)]
    world.run()
    figures = world.answer()["search"]
    assert figures["warnings"] == [f"1 of {figures['nodes_made']} steps failed: aborted while it waited"]
    assert (plain.finished(), world.scheduler.aborted) == (True, [])
    world.assert_balanced()


def test_a_bounded_queue_refuses_ordinary_requests_for_their_own_number_and_no_step() -> None:
    world = World()
    scheduler = world.scheduler
    scheduler.max_queued_requests = 2
    world.ask(algorithm="rebase", search_width=8)
    scheduler.tick()  # the prompt
    scheduler.holds_back = lambda _child: True
    scheduler.tick()  # the first level waits
    children = list(scheduler.waiting_queue)
    plain = [request(f"plain{i}", "x", search=False, max_new_tokens=5) for i in range(3)]
    is_refused = []
    for req in plain:
        is_refused.append(bound_queue(bounded, scheduler, req))
        scheduler.waiting_queue += [] if is_refused[-1] else [req]
    assert is_refused == [False, False, True]
    assert scheduler.waiting_queue == [*children, *plain[:2]]
    assert not bound_queue(bounded, scheduler, children[0]), "it was retracted, and goes on"
    scheduler.holds_back = lambda _child: False
    world.run()
    assert world.answer()["search"]["warnings"] == []
    world.assert_balanced()


def bounded(scheduler: FakeScheduler, _recv_req: Any) -> bool:
    """Whether one more is too many, as sglang has it."""
    return (
        scheduler.max_queued_requests is not None and len(scheduler.waiting_queue) + 1 > scheduler.max_queued_requests
    )


def test_a_child_aborted_for_want_of_memory_says_so() -> None:
    world = World()
    world.ask(algorithm="rebase")
    world.scheduler.tick()
    world.scheduler.holds_back = lambda _child: True
    world.scheduler.tick()
    world.scheduler.holds_back = lambda _child: False
    (first, *_) = [req for req in world.scheduler.waiting_queue if isinstance(req, ChildReq)]
    world.scheduler.waiting_queue.remove(first)
    first.to_finish = FINISH_ABORT("Out of memory")  # as sglang leaves it when it takes the request out of a batch
    assert world.ets.swallow_abort(first)
    world.run()
    figures = world.answer()["search"]
    assert figures["warnings"] == [f"1 of {figures['nodes_made']} steps failed: Out of memory"]
    world.assert_balanced()


def test_a_parent_gives_up_its_path_in_the_prm_though_one_of_its_children_failed() -> None:
    world = World()
    world.ask(algorithm="rebase")
    live = world.live()
    ticks = world.ticks()
    while not any(node.depth == 2 for node in live.search.tree.nodes):
        next(ticks)
    world.scheduler.holds_back = lambda _child: True
    next(ticks)  # the second level waits
    world.scheduler.holds_back = lambda _child: False
    (first, *_) = [req for req in world.scheduler.waiting_queue if isinstance(req, ChildReq)]
    world.scheduler.abort_request(AbortReq(rid=first.rid))
    while not any(node.depth == 3 for node in live.search.tree.nodes):
        next(ticks)
    parents = [node_id for node_id, branch in live.branches.items() if node_id and branch.num_open_children == 0]
    above = [live.branches[node_id] for node_id in parents if live.search.tree.nodes[node_id].depth == 1]
    assert any(branch.num_unscored_children == 0 for branch in above)
    assert [branch for branch in above if id(branch.prm) in world.prm.locked] == []
    for _ in ticks:
        pass
    world.assert_balanced()


def test_a_prompt_that_is_aborted_fails_the_search() -> None:
    world = World()
    world.ask()
    world.scheduler.holds_back = lambda _child: True
    world.scheduler.tick()
    world.scheduler.abort_request(AbortReq(rid=next(iter(world.live().children))))
    assert world.error() == "search failed: the prompt could not be computed: aborted while it waited"
    world.assert_balanced()


def is_queued(live: LiveSearch) -> bool:
    return not live.branches


def is_growing(live: LiveSearch) -> bool:
    return len(live.search.tree.nodes) > 1 and bool(live.children)


def waits_for_score(live: LiveSearch) -> bool:
    nodes = live.search.tree.nodes
    return any(node.finish is not None and node.score is None and node.state == "open" for node in nodes)


def waits_for(kind: str) -> Callable[[LiveSearch], bool]:
    return lambda live: live.awaited is not None and live.awaited[0] == kind


PHASES: dict[str, Callable[[LiveSearch], bool]] = {
    "queued": is_queued,
    "growing": is_growing,
    "scoring": waits_for_score,
    "selecting": waits_for("select"),
    "answering": waits_for("answer"),
}


@pytest.mark.parametrize("how", ["by its id", "by the beginning of its id", "all"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_aborts_gets_one_response_in_each_phase(phase: str, how: str) -> None:
    world = World()
    # One child is held back, so that the steps of the others wait for their scores.
    world.scheduler.holds_back = lambda child: phase == "scoring" and child.node_id == WIDTH
    world.ask(algorithm="ets", search_width=WIDTH)
    at = PHASES[phase]
    if not at(world.live()):
        assert any(world.ets.searches and at(world.live()) for _ in world.ticks(100)), f"never {phase}"
    recv = AbortReq(abort_all=True) if how == "all" else AbortReq(rid="pa" if how == "by its id" else "p")
    recv.abort_message = "the client has gone"
    world.scheduler.abort_request(recv)
    world.run(100)
    assert (world.error(), world.status()) == ("the client has gone", 499)
    assert world.ets.describe()["failed"] == 1
    world.assert_balanced()


@pytest.mark.parametrize("phase", PHASES)
def test_a_server_that_stops_ends_its_searches_and_begins_none(phase: str) -> None:
    world = World()
    world.scheduler.holds_back = lambda child: phase == "scoring" and child.node_id == WIDTH
    world.ask(algorithm="ets", search_width=WIDTH)
    at = PHASES[phase]
    if not at(world.live()):
        assert any(world.ets.searches and at(world.live()) for _ in world.ticks(100)), f"never {phase}"
    world.ets.stop()
    world.run(100)
    world.ask("pb", algorithm="ets", search_width=WIDTH)
    world.run(100)
    for rid in ("pa", "pb"):
        assert "the server is stopping" in world.error(rid)
        assert world.status(rid) == 503
    world.assert_balanced()


def test_a_flush_forgets_what_the_prm_has_cached() -> None:
    world = World()
    world.ets.after_flush()
    assert world.prm.num_forgotten == 1


def test_a_search_that_ends_leaves_requests_with_longer_ids_alone() -> None:
    world = World(FakeScheduler(tokens_per_tick=4))
    world.ask("pa", algorithm="rebase")
    for rid in ("pa/b", "pa/1", "pa"):
        world.ask(rid, search=False, max_new_tokens=180)
    world.scheduler.script = lambda req: three_steps(req) if isinstance(req, ChildReq) else tokens("y" * 200)
    world.run()
    assert len(world.scheduler.running_batch.reqs) == 3
    for _ in range(60):
        world.scheduler.tick()
    for rid in ("pa/b", "pa/1"):
        (sent,) = world.scheduler.output_streamer.responses(rid)
        assert sent.finished == {"type": "length", "length": 180}
    world.assert_balanced()


def test_an_id_may_be_used_again_while_its_first_search_drains() -> None:
    world = World(FakeScheduler(tokens_per_tick=1))
    world.ask("pa")
    for _ in range(4):
        world.scheduler.tick()
    world.scheduler.abort_request(AbortReq(rid="pa"))
    assert world.ets.searches  # its children run to their next token
    world.ask("pa", seed=2)
    world.run()
    kinds = [sent.finished["type"] for sent in world.scheduler.output_streamer.responses("pa") if sent.finished]
    assert kinds == ["abort", "length"]
    world.assert_balanced()


class Bug(RuntimeError):
    pass


def raises(*_args: Any, **_kwargs: Any) -> Any:
    raise Bug("a bug")


class BuggyPolicy:
    def __init__(self, is_cheap: bool) -> None:
        self.is_cheap = is_cheap

    def select(self, _level: Level, _config: Any) -> Selection:
        raise Bug("a bug")


def bug_in_the_tokenizer(world: World, req: Any) -> None:
    decode = req.tokenizer.decode  # as sglang asks for it; we ask for the text of steps without special tokens
    req.tokenizer.decode = lambda ids, **ours: raises() if ours else decode(ids)


def bug_in_the_prm(world: World, _req: Any) -> None:
    world.prm.open_prompt = raises  # type: ignore[method-assign]


def bug_in_a_policy(world: World, _req: Any) -> None:
    for name in ALGORITHMS:
        world.policies[name] = BuggyPolicy(is_cheap=name == "rebase")


def bug_in_the_result(world: World, _req: Any) -> None:
    world.live().search.tree.to_dict = raises


def bug_in_the_search(world: World, _req: Any) -> None:
    world.live().search.on_scored = raises


@pytest.mark.parametrize("algorithm", ["rebase", "ets"])  # decided on the loop, and on the worker's thread
@pytest.mark.parametrize(
    "plant", [bug_in_the_tokenizer, bug_in_the_prm, bug_in_a_policy, bug_in_the_result, bug_in_the_search]
)
def test_a_bug_fails_one_search_and_nothing_else(
    plant: Callable[[World, Any], None], algorithm: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    req = world.ask(algorithm=algorithm, return_tree=True)
    plant(world, req)
    world.run()
    assert world.error() == "search failed: Bug: a bug"
    world.assert_balanced()
    assert sum(record.exc_info is not None for record in caplog.records) == 1  # its other children only go


def test_a_bug_after_the_answer_sends_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_ets.engine.coordinator.finished_line", raises)
    world = World()
    world.ask()
    world.run()
    assert world.answer()["results"]
    world.assert_balanced()


def test_a_solver_that_fails_leaves_the_level_to_rebase_and_the_answer_says_so() -> None:
    class Fallback:
        def select(self, level: Level, config: Any) -> Selection:
            allocation = np.zeros(level.scores.size, dtype=np.int64)
            allocation[0] = level.remaining_width
            return Selection(allocation, is_fallback=True)

    world = World(policies={"ets": Fallback()})
    world.ask(algorithm="ets")
    world.run()
    assert world.answer()["search"]["warnings"] == ["the solver failed in 2 of 3 levels, where REBASE decided instead"]
    world.assert_balanced()


def test_a_selection_that_takes_long_keeps_nobody_else_waiting() -> None:
    may_end = threading.Event()

    class Slow(Rebase):
        is_cheap = False

        def select(self, level: Level, config: Any) -> Selection:
            assert may_end.wait(60)
            return super().select(level, config)

    world = World(policies={"ets": Slow()})
    world.ask("slow", algorithm="ets")
    world.ask("other", algorithm="rebase")
    for _ in world.ticks():
        if not may_end.is_set() and world.scheduler.output_streamer.responses("other"):
            assert [live.rid for live in world.ets.searches.values()] == ["slow"]
            may_end.set()
    assert world.answer("slow")["results"] and world.answer("other")["results"]
    assert world.answer("slow")["search"]["solver"]["loop_blocked_ms_max"] < 1e4
    world.assert_balanced()


# ---- memory and time run out ----


def test_locks_are_given_up_when_they_are_in_the_way_and_the_answer_says_so() -> None:
    world = World(FakeScheduler(lambda child: tokens(f"{child.node_id:020d}\n"), pool_tokens=200))
    world.ask(algorithm="rebase", rebase_temperature=1000, max_new_tokens=100, max_step_tokens=40, search_width=8)
    world.run()
    figures = world.answer()["search"]
    assert figures["kv_pressure_releases"] > 0
    (warning,) = figures["warnings"]
    assert warning.startswith(
        f"the KV pool was full and this search gave up its KV {figures['kv_pressure_releases']} times"
    )
    world.assert_balanced()


def test_a_pool_that_can_never_go_on_fails_the_youngest_search_with_what_to_do() -> None:
    world = World()
    world.ask("old")
    world.scheduler.holds_back = lambda child: child.spec.parent.rid == "young"
    world.ask("young")
    for _ in world.ticks(HOPELESS_TICKS + 100):
        pass
    assert world.answer("old")
    assert world.error("young") == (
        "search failed: the KV pool of 20000 tokens cannot take one more step; lower search_width or max_tokens, or raise "
        "--max-total-tokens"
    )
    world.assert_balanced()


def pass_deadline(live: LiveSearch) -> None:
    live.started_s = time.monotonic() - 1e5


def test_a_deadline_before_the_first_step_answers_with_what_the_children_have() -> None:
    world = World(FakeScheduler(lambda child: tokens("a long way € to go"), tokens_per_tick=1))
    world.ask(deadline_s=1e4, stream=True, return_tree=True)
    for _ in range(13):  # one for the prompt, twelve tokens
        world.scheduler.tick()
    pass_deadline(world.live())
    world.run()
    result = world.answer()
    best = result["results"][0]
    assert best["text"] == "a long way \ufffd"
    assert (best["finish_reason"], result["search"]["finish_reason"]) == ("length", "deadline")
    assert result["search"]["warnings"] == [
        "deadline_s of 10000 ended the search after 0 levels with 0 of 4 trajectories complete"
    ]
    world.assert_balanced()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_ticks", range(2, 24, 3))
def test_a_deadline_at_any_time_answers(algorithm: str, num_ticks: int) -> None:
    world = World(FakeScheduler(tokens_per_tick=1))
    world.ask(algorithm=algorithm, deadline_s=1e4)
    for _ in range(num_ticks):
        world.scheduler.tick()
    if world.live().has_ended:
        pytest.fail("the search was over before its deadline")
    pass_deadline(world.live())
    world.run()
    result = world.answer()
    assert result["results"][0]["text"]
    assert result["search"]["finish_reason"] == "deadline"
    world.assert_balanced()


def test_a_deadline_of_a_search_that_was_suspended_in_its_first_level_answers_with_what_it_had() -> None:
    world = World(FakeScheduler(lambda child: tokens("a long way to go"), tokens_per_tick=1))
    world.ask(deadline_s=1e4)
    for _ in range(7):  # one for the prompt, six tokens
        world.scheduler.tick()
    for child in world.scheduler.running_batch.reqs:
        world.scheduler.waiting_queue.append(world.scheduler.retract(child))
    world.scheduler.last_batch = FakeBatch()
    assert world.ets._steps.withdraw(world.live().id) == WIDTH
    pass_deadline(world.live())
    world.run()
    assert world.answer()["results"][0]["text"] == "a long"
    world.assert_balanced()


@pytest.mark.parametrize("overlaps", [False, True])
def test_children_that_an_abort_does_not_find_end_with_their_next_token(
    overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search may fail after a batch, when sglang has launched the next one and does not know it as the last one yet."""
    world = World(FakeScheduler(lambda child: tokens("a long way to go " * 8), tokens_per_tick=1))
    world.scheduler.overlaps = overlaps
    world.ask()
    for _ in range(7):  # one for the prompt, or two; then tokens
        world.scheduler.tick()
    with monkeypatch.context() as patch:
        patch.setattr(world.scheduler, "abort_request", lambda _recv_req: None)
        world.ets.fail(world.live(), "that was it")
    assert len(world.scheduler.running_batch.reqs) == WIDTH
    assert sum(1 for _ in world.ticks()) <= 3
    assert world.error() == "search failed: that was it"
    world.assert_balanced()


def test_a_deadline_before_the_first_token_is_no_fault() -> None:
    world = World()
    world.ask(deadline_s=1e4)
    pass_deadline(world.live())
    world.run()
    assert world.error() == (
        "deadline_s of 10000 passed before the search had any text; raise it, or send fewer requests at once"
    )
    assert world.status() == 504
    world.assert_balanced()


def test_a_child_with_logits_that_are_not_finite_fails_alone() -> None:
    def not_finite_at_first(child: ChildReq) -> Sequence[int]:
        return [VOCAB] if child.node_id == 1 else three_steps(child)

    world = World(FakeScheduler(not_finite_at_first))
    world.ask()
    world.run()
    (warning,) = world.answer()["search"]["warnings"]
    assert warning.endswith("steps failed: the policy model's logits are not finite")
    world.assert_balanced()


ENDS: tuple[Callable[[World, LiveSearch], None], ...] = (
    lambda world, live: None,  # it is answered
    lambda world, live: world.scheduler.abort_request(AbortReq(rid=live.rid)),
    lambda world, live: pass_deadline(live),
    lambda world, live: world.ets.fail(live, "made up"),
)


def test_searches_that_have_ended_leave_no_object_behind() -> None:
    """A server lives for months: whatever a search was made of goes with it."""
    before = made_of_searches()
    world = World()
    for number, (algorithm, end, num_ticks) in enumerate(itertools.product(ALGORITHMS, ENDS, (0, 2, 4))):
        world.ask(algorithm=algorithm, deadline_s=1e4, stream=bool(number % 2), custom={TRACE_PARAM: True})
        for _ in range(num_ticks):
            world.scheduler.tick()
        for live in list(world.ets.searches.values()):
            end(world, live)
        world.run()
    del live
    world.assert_balanced()
    world.scheduler.last_batch = None  # sglang keeps the requests of the last batch
    given_up_s = time.monotonic() + 10
    while made_of_searches() != before and time.monotonic() < given_up_s:
        time.sleep(0.01)  # the worker thread may still make a selection for a search that has ended
    assert made_of_searches() == before


def made_of_searches() -> Counter[type]:
    gc.collect()
    made = (LiveSearch, Search, SearchTree, Node, Branch, Hold, ScriptedPath, ChildReq)
    return Counter(type(thing) for thing in gc.get_objects() if isinstance(thing, made))


def test_the_state_names_what_runs_and_what_it_holds() -> None:
    world = World()
    world.ask("pa", algorithm="rebase")
    world.scheduler.tick()
    state = world.ets.describe()
    assert [(search["id"], search["algorithm"], search["width"]) for search in state["searches"]] == [
        ("pa", "rebase", 4)
    ]
    assert state["held_kv_tokens"] == state["searches"][0]["held_kv_tokens"] == len("Q: 1+1?\n")
    assert (state["live"], state["done"], state["locks"], state["prm"]) == (1, 0, 1, {"locks": 1})
    assert state["defaults"]["algorithm"] == "rebase"
    world.run()
    assert (world.ets.describe()["done"], world.ets.describe()["searches"]) == (1, [])


def test_end_of_text_is_no_part_of_the_answers_text() -> None:
    world = World()
    world.ask()
    world.run()
    best = world.answer()["results"][0]
    assert best["token_ids"][-1] == EOS
    assert best["text"].encode() == bytes(best["token_ids"][:-1])


def test_a_budget_that_no_leaf_fits_ends_the_search_with_a_warning_and_without_a_report() -> None:
    world = World()
    world.ask(algorithm="ets", kv_budget_tokens=1, stream=True)
    world.run()
    result = world.answer()
    assert (result["search"]["finish_reason"], result["results"][0]["finish_reason"]) == ("kv_budget", "length")
    ended = "kv_budget_tokens of 1 ended the search after 1 levels with 0 of 4 trajectories complete"
    assert result["search"]["warnings"] == [ended]
    assert world.scheduler.output_streamer.reports("pa") == []
    world.assert_balanced()


def test_metrics_are_counted_once_for_each_event() -> None:
    world = World()
    events: list[str] = []

    class Events(NoMetrics):
        def level_done(self, live: LiveSearch) -> None:
            events.append("level")

        def selected(self, live: LiveSearch, selection: Selection, seconds: float) -> None:
            events.append("selected")

        def ended(self, live: LiveSearch, seconds: float) -> None:
            events.append("ended")

        def sync(self, num_searches: int, ledger: RadixLedger) -> None:
            counts.append((num_searches, ledger.held_tokens()))

    counts: list[tuple[int, int]] = []
    world.ets._metrics = Events()
    world.ask(algorithm="beam")
    world.run()
    assert events == ["level", "selected"] * 2 + ["level", "ended"]
    assert counts[0] == (1, 0)
    assert counts[-1] == (0, 0)
    assert max(held for _, held in counts) > len("Q: 1+1?\n")


def test_a_request_that_sglang_raises_over_is_refused_by_its_id() -> None:
    world = World()
    sent: list[Any] = []
    world.scheduler.send_abort_output = lambda abort, req: sent.append((abort, req))
    recv_req = SimpleNamespace(rid="strange")
    world.ets.refuse(recv_req, TypeError("can only concatenate str"))
    ((abort, req),) = sent
    assert (abort.rid, req) == ("strange", recv_req)
    assert abort.finished_reason["status_code"] == 400
    assert "TypeError: can only concatenate str" in abort.finished_reason["message"]
    world.assert_balanced()
