"""sglang's own `/metrics` shows the searches of a real server."""

from __future__ import annotations

import re
import time
from collections import defaultdict

import pytest

from sglang_ets.engine.metrics import METRICS, PREFIX
from tests.e2e.serving import PROBLEMS, Server

pytestmark = pytest.mark.server


def samples(server: Server) -> dict[str, float]:
    """Sum of each sample name of ours over its labels."""
    found: dict[str, float] = defaultdict(float)
    for name, value in re.findall(rf"^({PREFIX}\w+)\{{[^}}]*\}} (\S+)$", server.text("/metrics"), flags=re.MULTILINE):
        found[name] += float(value)
    return found


def lines_of(server: Server) -> int:
    """How many searches the log says are complete."""
    return server.log.read_text(errors="replace").count(" complete in ")


def test_metrics_of_real_searches(traced: Server) -> None:
    before, lines_before = samples(traced), lines_of(traced)
    answers = [
        traced.search(problem["prompt"], 8, search={"algorithm": algorithm})
        for problem, algorithm in zip(PROBLEMS, ("ets", "rebase", "best_of_n"), strict=False)
    ]
    traced.wait_until_no_search()
    time.sleep(0.5)
    seen = samples(traced)
    figures = [answer["search"] for answer in answers]
    expected = {
        "searches_total": len(answers),
        "levels_total": sum(figure["levels"] for figure in figures),
        "nodes_made_total": sum(figure["nodes_made"] for figure in figures),
        "nodes_pruned_total": sum(figure["nodes_pruned"] for figure in figures),
        "prm_tokens_total": sum(figure["prm_tokens"] for figure in figures),
        "generated_tokens_total": sum(answer["usage"]["completion_tokens"] for answer in answers),
        "solver_seconds_count": sum(figure["solver"]["calls"] for figure in figures),
    }
    assert {name: seen[f"{PREFIX}{name}"] - before[f"{PREFIX}{name}"] for name in expected} == expected
    assert seen[f"{PREFIX}searches_running"] == 0
    assert seen[f"{PREFIX}kv_held_tokens"] == 0
    assert seen[f"{PREFIX}kv_freed_tokens_total"] > before[f"{PREFIX}kv_freed_tokens_total"]
    rare = {f"{PREFIX}rebase_fallbacks_total"}
    assert {name for metric in METRICS for name in metric.exposed_names} - set(seen) <= rare
    assert lines_of(traced) - lines_before == len(answers)
