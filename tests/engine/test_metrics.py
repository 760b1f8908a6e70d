"""The metrics of searches: what each event adds, that off costs nothing, and that the dashboard asks for what exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import CostTree, solve
from sglang_ets.core.selection import Selection
from sglang_ets.core.tree import NOT_FINITE, SearchTree
from sglang_ets.engine.figures import finished_line
from sglang_ets.engine.metrics import FAILURES, METRICS, PREFIX, NoMetrics, SearchMetrics, make_metrics, outcome_of

DASHBOARD = Path(__file__).resolve().parents[2] / "bench" / "grafana.json"
LABELS = {"model_name": "m", "tp_rank": 0}
UNITS = ("tokens", "seconds", "steps", "searches", "levels", "running", "made", "pruned", "releases", "fallbacks")


class Finished:
    """A finish reason as sglang's requests carry it."""

    def __init__(self, kind: str, status: int) -> None:
        self.kind = kind
        self.status = status

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "status_code": self.status}


def live_search(end_reason: str = "", finish: str = "length", status: int = 500) -> Any:
    tree = SearchTree(3)
    for state, tokens in (("retained", (1, 2)), ("pruned", (3,))):
        node = tree.add_child(tree.root)
        tree.set_step(node, tokens, "x", "step")
        node.state = state  # type: ignore[assignment]
    return SimpleNamespace(
        id="a",
        search=SimpleNamespace(tree=tree, config=SearchConfig(algorithm="ets"), num_revived=0),
        prm_tokens=9,
        guesses=SimpleNamespace(num_children=5, num_used=3, tokens_wasted=40),
        num_pressure_releases=1,
        end_reason=end_reason,
        req=SimpleNamespace(finished_reason=Finished(finish, status)),
    )


def ledger(held: int, freed: int) -> Any:
    return SimpleNamespace(held_tokens=lambda: held, freed_tokens=freed)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> SearchMetrics:
    return SearchMetrics(LABELS, registry)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(PREFIX + name, {"model_name": "m", "tp_rank": "0", **labels})


def test_a_search_is_counted_once_however_often_it_is_published(
    registry: CollectorRegistry, metrics: SearchMetrics
) -> None:
    live = live_search("complete")
    metrics.level_done(live)
    metrics.sync(2, ledger(held=70, freed=5))
    assert value(registry, "searches_running") == 2
    assert value(registry, "kv_held_tokens") == 70
    live.prm_tokens = 12
    metrics.ended(live, 3.0)
    metrics.sync(1, ledger(held=40, freed=9))
    counts = {
        name: value(registry, f"{name}_total", algorithm="ets") for name in ("levels", "nodes_made", "prm_tokens")
    }
    assert counts == {"levels": 1, "nodes_made": 2, "prm_tokens": 12}
    assert value(registry, "nodes_pruned_total", algorithm="ets") == 1
    assert value(registry, "generated_tokens_total", algorithm="ets") == 3
    assert value(registry, "kv_pressure_releases_total", algorithm="ets") == 1
    assert value(registry, "speculated_steps_total", algorithm="ets") == 5
    assert value(registry, "used_speculated_steps_total", algorithm="ets") == 3
    assert value(registry, "speculation_wasted_tokens_total", algorithm="ets") == 40
    assert value(registry, "kv_freed_tokens_total") == 9
    assert value(registry, "searches_running") == 1
    assert value(registry, "searches_total", algorithm="ets", outcome="complete") == 1
    assert value(registry, "search_seconds_sum", algorithm="ets") == 3.0


def test_failed_steps_are_counted_by_reason(registry: CollectorRegistry, metrics: SearchMetrics) -> None:
    live = live_search("complete")
    tree = live.search.tree

    def fail(reason: str, is_decoded: bool = False) -> None:
        node = tree.add_child(tree.root)
        if is_decoded:
            tree.set_step(node, (1,), "x", "step")
        node.state, node.reason = "failed", reason

    fail(NOT_FINITE)
    metrics.level_done(live)
    for reason in ("out of memory, 5 tokens", "aborted while it waited"):
        fail(reason)
    fail("the score is not finite", is_decoded=True)
    metrics.ended(live, 1.0)
    counts = {reason: value(registry, "failed_steps_total", algorithm="ets", reason=reason) for reason in FAILURES}
    assert counts == {"ended": 2, "not_finite": 1, "unscored": 1}


def test_calls_of_prm_and_solver_are_timed(registry: CollectorRegistry, metrics: SearchMetrics) -> None:
    metrics.scored(16, 0.02)
    assert value(registry, "prm_batch_steps_sum") == 16
    assert value(registry, "score_seconds_bucket", le="0.025") == 1
    tree = CostTree(np.array([-1, -1]), np.array([1.0, 1.0]), np.array([0, 1]))
    _, report = solve(np.array([0.5, 0.5]), tree, 1.0, None, 0.0, None)
    metrics.selected(live_search(), Selection(np.array([1, 1]), solver=report), 0.3)
    metrics.selected(live_search(), Selection(np.array([1, 1]), is_fallback=True), 0.3)
    assert value(registry, "select_seconds_count", algorithm="ets") == 2
    solved = value(registry, "solver_seconds_sum", algorithm="ets")
    assert solved == pytest.approx((report.build_ms + report.solve_ms) / 1e3)
    assert value(registry, "rebase_fallbacks_total", algorithm="ets") == 1


@pytest.mark.parametrize(
    ("end_reason", "finish", "status", "outcome"),
    [
        ("complete", "length", 200, "complete"),
        ("deadline", "length", 200, "deadline"),
        ("deadline", "abort", 504, "expired"),
        ("deadline", "abort", 500, "failed"),
        ("aborted", "abort", 499, "aborted"),
        ("failed", "abort", 500, "failed"),
        ("", "abort", 400, "refused"),
    ],
)
def test_outcomes(end_reason: str, finish: str, status: int, outcome: str) -> None:
    assert outcome_of(live_search(end_reason, finish, status)) == outcome


def test_metrics_that_are_off_do_nothing_and_import_nothing() -> None:
    off = SimpleNamespace(metrics_collector_context=SimpleNamespace(current_scheduler_metrics_enabled=False))
    made = make_metrics(off)
    assert type(made) is NoMetrics
    nothing: Any = None  # any look at an argument would raise
    made.level_done(nothing)
    made.scored(nothing, nothing)
    made.selected(nothing, nothing, nothing)
    made.ended(nothing, nothing)
    made.sync(nothing, nothing)
    code = "import sys, sglang_ets.engine.metrics; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("metric", METRICS, ids=[metric.name for metric in METRICS])
def test_names_end_in_their_unit(metric: Any) -> None:
    assert metric.name.split("_")[-1] in UNITS


def test_every_query_of_the_dashboard_names_a_metric_and_every_metric_is_shown() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    exposed = {name: metric.name for metric in METRICS for name in metric.exposed_names}
    asked = [re.findall(rf"{PREFIX}\w+", query) for query in queries]
    assert all(asked), "a query without a metric of ours"
    assert {name for names in asked for name in names} <= set(exposed)
    assert {exposed[name] for names in asked for name in names} == {metric.name for metric in METRICS}


def test_the_line_of_a_finished_search_reads_as_a_sentence() -> None:
    figures = {
        "id": "a", "algorithm": "ets", "width": 16, "finish_reason": "complete", "levels": 7, "nodes_made": 90,
        "nodes_pruned": 31, "kv_tokens_peak": 400, "kv_referenced_peak": 1900, "seconds": 1.234,
    }  # fmt: skip
    usage = {"completion_tokens": 800, "prm_tokens": 950}
    line = finished_line({"search": figures, "usage": usage, "results": [{"answer": "42", "score": 0.9}]})
    assert line == (
        "search a complete in 1.23 s: ets width 16, 7 levels, 90 nodes (31 pruned), KV peak 400 of 1900 referenced "
        "tokens, 800 tokens generated, 950 read by the PRM, answer '42' with score 0.900"
    )
