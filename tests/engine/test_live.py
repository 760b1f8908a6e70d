"""What one search holds, and the figures that are made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import SolverReport
from sglang_ets.core.search import Search
from sglang_ets.engine.children import ChildSpec, SearchIds
from sglang_ets.engine.figures import figures_of, lost_level, warnings_of
from sglang_ets.engine.live import ROOT, Branch, KvSample, LiveSearch
from sglang_ets.kv import Hold, PathSnapshot
from sglang_ets.wire import TRACE_PARAM
from tests.engine.fakes import request

PROMPT = "Q: 1"


def live_search(width: int = 4, custom: dict[str, Any] | None = None, **settings: Any) -> LiveSearch:
    config = SearchConfig(**{"width": width, "max_tokens": 10, "max_steps": 3, **settings})
    req = request("pa", PROMPT, custom=custom)
    live = LiveSearch(
        ChildSpec(SearchIds().new(), req, config.seed, config.step_delimiter), Search(config, len(PROMPT))
    )
    live.search.start()
    live.branches[ROOT] = Branch(Hold("x", 0, "lock"))
    return live


class FakeLedger:
    """Paths are given: each locked hold ends at a node of one token that hangs at the prompt."""

    def snapshot(self, holds: list[Hold]) -> Any:
        class Snapshot(PathSnapshot):
            def unique_tokens(self, holds: Any) -> int:
                return len(PROMPT) + sum(hold.locked for hold in holds)

        return Snapshot({})


def test_the_search_has_two_names() -> None:
    live = live_search()
    assert live.rid == "pa"
    assert live.id == live.spec.search_id != live.rid
    assert live.prompt_tokens == len(PROMPT)


def test_it_ends_before_it_is_over() -> None:
    live = live_search()
    live.children.add("child")
    assert (live.has_ended, live.is_over) == (False, False)
    live.end_reason = "deadline"
    assert (live.has_ended, live.is_over) == (True, False)
    live.is_answered = True
    assert not live.is_over
    live.children.clear()
    assert live.is_over


def test_only_a_traced_search_keeps_its_changes() -> None:
    assert live_search().changes is None
    assert live_search(custom={TRACE_PARAM: False}).changes is None
    assert live_search(custom={TRACE_PARAM: True}).changes is not None


def test_parents() -> None:
    live = live_search()
    assert live.parent_id(1) == ROOT
    with pytest.raises(ValueError, match="has no parent"):
        live.parent_id(ROOT)


def test_kv_samples_count_leaves_and_what_they_reference() -> None:
    live = live_search()
    first, second = live.search.tree.nodes[1:3]
    live.search.on_step(first.id, (1, 2, 3), "abc", "step")
    live.search.on_step(second.id, (1,), "a", "step")
    live.branches[ROOT].hold = None
    live.branches[first.id] = Branch(Hold("x", 1, "lock"))
    live.branches[second.id] = Branch(Hold("x", 2, "lock"), is_tip=False, num_open_children=3)
    live.sample_kv(FakeLedger(), 1)  # type: ignore[arg-type]
    sample = live.kv[0]
    assert (sample.depth, sample.num_leaves, sample.retained_tokens) == (1, 4, None)
    assert sample.referenced_tokens == (len(PROMPT) + 3) + 3 * (len(PROMPT) + 1)
    assert sample.held_tokens == len(PROMPT) + 2
    live.branches[first.id].hold = Hold("x", 1)  # pruned
    live.sample_retained()
    assert live.kv[0].retained_tokens == len(PROMPT) + 1
    assert (live.kv[0].held_tokens, live.kv[0].num_leaves) == (len(PROMPT) + 2, 4)
    assert len(live.holds()) == 1


def fail_steps(live: LiveSearch, reasons: dict[int, str]) -> None:
    for node_id, reason in reasons.items():
        live.search.on_failed(node_id, reason)


def test_warnings_group_failures_by_reason_whatever_their_numbers() -> None:
    live = live_search(width=6)
    assert warnings_of(live) == figures_of(live)["warnings"] == []
    fail_steps(live, {1: "5 tokens left for 60", 2: "no memory", 4: "3 tokens left for 61"})
    assert warnings_of(live) == ["2 of 6 steps failed: 5 tokens left for 60", "1 of 6 steps failed: no memory"]


def test_warnings_name_pressure_fallbacks_and_the_deadline() -> None:
    live = live_search(deadline_s=2.5)
    live.num_pressure_releases, live.num_fallbacks, live.end_reason = 3, 1, "deadline"
    pressure, solver, deadline = warnings_of(live)
    assert "gave up its KV 3 times" in pressure and "--max-total-tokens" in pressure
    assert solver.startswith("the solver failed in 1 of 0 levels")
    assert deadline == "deadline_s of 2.5 ended the search after 0 levels with 0 of 4 trajectories complete"


def test_a_solver_that_runs_out_of_time_is_a_warning() -> None:
    live = live_search()
    report = SolverReport("optimal", "integer", 1.0, 0.0, 9, 9, 9, 9, 1.0, 1.0)
    live.solver_reports += [report, replace(report, status="time_limit", gap=0.1)]
    live.kv = [KvSample(1, 4, 0, 0)] * 3
    assert warnings_of(live) == [
        "the solver's time of 2 s ended in 1 of 3 levels, where the best leaves that it had were kept; lower search_width"
    ]


def test_a_spent_token_budget_is_a_warning() -> None:
    live = live_search(max_total_tokens=40, max_step_tokens=10, max_tokens=10)
    assert warnings_of(live) == []
    live.search.num_given_up = 3
    assert warnings_of(live) == [
        "max_total_tokens of 40 did not suffice: 3 of 4 trajectories were not grown to their end, 0 are complete; raise it or "
        "lower search_width"
    ]


def test_a_level_is_lost_with_more_than_half_of_its_steps() -> None:
    live = live_search(width=4)
    fail_steps(live, {1: "no memory", 2: "no memory"})
    assert lost_level(live, 1) is None
    fail_steps(live, {3: "not finite"})
    assert lost_level(live, 1) == "3 of the 4 steps of level 1 failed, more than half: no memory; not finite"
    assert lost_level(live, 2) is None
