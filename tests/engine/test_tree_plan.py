"""What `ets_tree` is told: shared KV as the radix tree has it, once for each change of rows, and only before a decode."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang_ets.patches.tree_attention import plan_attention

from sglang_ets.core.attention_plan import AttentionPlan, Segment
from sglang_ets.engine.tree_plan import TreePlanner, make_planner
from sglang_ets.prm.stream import ForwardStream
from tests.engine.fakes import FakeScheduler
from tests.prm.streams import Streams

PROMPT = list(range(300))


class Backend:
    """Keeps the plans it is given."""

    def __init__(self) -> None:
        self.plans: list[tuple[list[str], AttentionPlan]] = []

    def load_plan(self, rids: Sequence[str], plan: AttentionPlan) -> None:
        self.plans.append((list(rids), plan))


class Tree:
    """A real radix cache, and requests that end at its nodes."""

    def __init__(self) -> None:
        self.scheduler = FakeScheduler()
        self.scheduler.enable_overlap = False  # type: ignore[attr-defined]
        self.backend = Backend()
        self.planner = TreePlanner(self.scheduler.tree_cache, self.backend, ForwardStream(self.scheduler))

    def request(self, rid: str, ids: Sequence[int]) -> Any:
        """A request whose cached prefix is `ids`."""
        key, cache = RadixKey(array("q", ids)), self.scheduler.tree_cache
        cache.insert(InsertParams(key=key, value=self.scheduler.token_to_kv_pool_allocator.alloc(len(ids))))
        return SimpleNamespace(rid=rid, last_node=int(cache.match_prefix(MatchPrefixParams(key=key)).last_device_node))


def decode(*reqs: Any) -> Any:
    return SimpleNamespace(reqs=list(reqs), forward_mode=SimpleNamespace(is_decode=lambda: True))


@pytest.fixture
def tree() -> Tree:
    return Tree()


def test_rows_share_what_the_radix_tree_says_they_share(tree: Tree) -> None:
    step = [*PROMPT, *range(500, 800)]
    rows = [
        tree.request("a", [*step, 1]),
        tree.request("b", PROMPT),
        tree.request("c", [*step, 2, 2]),
        tree.request("alone", range(900, 905)),
    ]
    tree.planner.after_plan(decode(*rows))
    ((rids, plan),) = tree.backend.plans
    assert rids == ["a", "b", "c", "alone"]
    assert [(one.start, one.end, set(one.rows)) for one in plan.segments()] == [(0, 300, {0, 1, 2}), (300, 600, {0, 2})]
    assert plan.private_from.tolist() == [600, 300, 600, 0]


def test_rows_that_only_grow_keep_their_plan(tree: Tree) -> None:
    rows = [tree.request(rid, PROMPT) for rid in "ab"]
    for _ in range(3):
        tree.planner.after_plan(decode(*rows))
    assert len(tree.backend.plans) == 1
    tree.planner.after_plan(decode(rows[0]))
    tree.planner.after_plan(decode(*rows))
    assert [rids for rids, _ in tree.backend.plans] == [["a", "b"], ["a"], ["a", "b"]]
    rows[0].last_node = tree.request("a", [*PROMPT, 7]).last_node  # sglang has cached more of it
    tree.planner.after_plan(decode(*rows))
    assert len(tree.backend.plans) == 4


def test_no_batch_and_no_decode_change_nothing(tree: Tree) -> None:
    tree.planner.after_plan(None)
    extend = SimpleNamespace(reqs=[tree.request("a", PROMPT)], forward_mode=SimpleNamespace(is_decode=lambda: False))
    tree.planner.after_plan(extend)
    assert tree.backend.plans == []


def test_ordinary_requests_that_share_a_prompt_are_planned_too(tree: Tree) -> None:
    tree.planner.after_plan(decode(*(tree.request(rid, PROMPT) for rid in "ab")))
    ((_, plan),) = tree.backend.plans
    assert list(plan.segments()) == [Segment(0, 300, (0, 1))]


def test_only_a_backend_that_takes_plans_gets_any(tree: Tree) -> None:
    for backend, is_planned in ((Backend(), True), (object(), False)):
        tree.scheduler.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(attn_backend=backend))  # type: ignore[attr-defined]
        assert (make_planner(tree.scheduler) is not None) is is_planned


def test_the_hook_hands_on_the_batch_that_runs_next() -> None:
    told: list[Any] = []
    plan = SimpleNamespace(batch_to_run="batch")
    for planner in (told.append, None):
        assert plan_attention(plan, SimpleNamespace(ets=SimpleNamespace(plan_attention=planner))) is plan
    assert told == ["batch"]


# ---- the stream ----


def test_a_plan_is_copied_between_two_forward_passes(tree: Tree) -> None:
    streams = Streams(enable_overlap=True)
    backend = SimpleNamespace(load_plan=lambda *_args: streams.events.append("load"))
    TreePlanner(tree.scheduler.tree_cache, backend, ForwardStream(streams)).after_plan(
        decode(tree.request("a", PROMPT))
    )
    assert streams.events == ["on forward", "forward waits for schedule", "load", "off forward"]


def test_what_the_scheduler_does_later_waits_for_joined_work_whatever_it_raises() -> None:
    streams = Streams(enable_overlap=True)
    with pytest.raises(KeyError), ForwardStream(streams).joined():
        raise KeyError
    assert streams.events[-1] == "schedule waits for forward"


def test_without_the_overlap_schedule_there_is_one_stream() -> None:
    streams = Streams(enable_overlap=False)
    with ForwardStream(streams).joined(), ForwardStream(streams).queued():
        pass
    assert streams.events == []
