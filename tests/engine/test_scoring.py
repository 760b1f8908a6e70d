"""When steps go to the PRM, in which order, and what becomes of those whose search has ended."""

from __future__ import annotations

from typing import Any

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.search import Search
from sglang_ets.engine.children import ChildSpec, SearchIds
from sglang_ets.engine.live import ROOT, Branch, LiveSearch
from sglang_ets.engine.metrics import NoMetrics
from sglang_ets.engine.scoring import SCORE_BATCH_STEPS, StepScoring
from sglang_ets.prm.steps import PrmError
from tests.engine.fakes import ScriptedPrm, request


class CountingMetrics(NoMetrics):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def scored(self, num_steps: int, seconds: float) -> None:
        self.sizes.append(num_steps)


def growing(prm: ScriptedPrm, width: int) -> LiveSearch:
    """A search whose first level has been generated, with one child still running."""
    config = SearchConfig(width=width)
    live = LiveSearch(ChildSpec(SearchIds().new(), request("pa", "Q"), 0, ()), Search(config, 1))
    live.search.start()
    live.branches[ROOT] = Branch(prm=prm.open_prompt((1,), "Q", live.id))  # type: ignore[arg-type]
    for node in live.search.tree.nodes[1:]:
        live.search.on_step(node.id, (node.id,), f"step {node.id}", "step")
        live.branches[node.id] = Branch()
    live.children.add("running")
    return live


def scoring(prm: Any) -> tuple[StepScoring, CountingMetrics]:
    metrics = CountingMetrics()
    return StepScoring(prm, metrics), metrics


def test_steps_wait_while_their_searches_have_children_and_the_batch_is_small() -> None:
    prm = ScriptedPrm()
    live = growing(prm, 4)
    steps, metrics = scoring(prm)
    steps.add(live, 1)
    assert list(steps.outcomes()) == []
    live.children.clear()  # its level is complete
    ((of, node_id, outcome),) = steps.outcomes()
    assert (of, node_id) == (live, 1)
    assert not isinstance(outcome, PrmError)
    assert list(steps.outcomes()) == []
    assert metrics.sizes == [1]


def test_a_large_batch_does_not_wait_and_one_complete_level_takes_the_others_along() -> None:
    prm = ScriptedPrm()
    wide, narrow = growing(prm, SCORE_BATCH_STEPS), growing(prm, 2)
    steps, metrics = scoring(prm)
    for node_id in range(1, SCORE_BATCH_STEPS):
        steps.add(wide, node_id)
    assert list(steps.outcomes()) == []
    steps.add(wide, SCORE_BATCH_STEPS)
    assert [node_id for _, node_id, _ in steps.outcomes()] == list(range(1, SCORE_BATCH_STEPS + 1))
    steps.add(wide, 1)
    steps.add(narrow, 1)
    narrow.children.clear()
    assert [(live, node_id) for live, node_id, _ in steps.outcomes()] == [(wide, 1), (narrow, 1)]
    assert metrics.sizes == [SCORE_BATCH_STEPS, 2]


def test_a_step_follows_its_parent() -> None:
    prm = ScriptedPrm()
    live = growing(prm, 2)
    child = live.search.tree.add_child(live.search.tree.nodes[1])
    live.search.on_step(child.id, (9,), "next", "step")
    live.branches[child.id] = Branch()
    live.children.clear()
    steps, _ = scoring(prm)
    steps.add(live, child.id)
    steps.add(live, 1)
    order = []
    for _, node_id, outcome in steps.outcomes():
        assert not isinstance(outcome, PrmError)
        live.branches[node_id].prm = outcome[1]
        order.append(node_id)
    assert order == [1, child.id]
    assert prm.batches == [["step 1"], ["next"]]


def test_steps_of_a_search_that_ends_between_two_outcomes_are_not_scored() -> None:
    prm = ScriptedPrm()
    live, other = growing(prm, 2), growing(prm, 2)
    steps, _ = scoring(prm)
    live.children.clear()
    other.children.clear()
    steps.add(live, 1)
    steps.add(other, 1)
    seen = []
    for of, node_id, _ in steps.outcomes():
        seen.append((of, node_id))
        if of is live:
            steps.add(live, 2)
            live.end_reason = "failed"
            live.branches.clear()
    assert seen == [(live, 1), (other, 1)]
    assert prm.batches == [["step 1", "step 1"]]


def test_a_call_that_raises_is_an_error_of_every_step_in_it() -> None:
    def broken(_job: Any) -> float:
        raise IndexError("out of range")

    prm = ScriptedPrm(broken)
    live = growing(prm, 2)
    live.children.clear()
    steps, metrics = scoring(prm)
    steps.add(live, 1)
    steps.add(live, 2)
    outcomes = [outcome for _, _, outcome in steps.outcomes()]
    assert [str(outcome) for outcome in outcomes] == ["IndexError: out of range"] * 2
    assert all(isinstance(outcome, PrmError) for outcome in outcomes)
    assert metrics.sizes == [2]
