"""sglang's own `/metrics` shows the searches of a real server."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest

from sglang_ets.engine.metrics import METRICS, PREFIX
from tests.e2e.serving import PROBLEMS, Server, serving

pytestmark = pytest.mark.server


def samples(server: Server) -> dict[str, float]:
    """Sum of each sample name of ours over its labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(rf"^({PREFIX}\w+)\{{[^}}]*\}} (\S+)$", text, flags=re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def test_metrics_of_real_searches(tmp_path: Path) -> None:
    with serving(tmp_path / "log.txt", ["--search", "ets", "--enable-metrics"]) as server:
        answers = [
            server.search(problem["prompt"], 8, search={"algorithm": algorithm})
            for problem, algorithm in zip(PROBLEMS, ("ets", "rebase", "best_of_n"), strict=False)
        ]
        server.wait_until_no_search()
        time.sleep(0.5)
        seen = samples(server)
        figures = [answer["search"] for answer in answers]
        assert seen[f"{PREFIX}searches_total"] == len(answers)
        assert seen[f"{PREFIX}searches_running"] == 0
        assert seen[f"{PREFIX}kv_held_tokens"] == 0
        assert seen[f"{PREFIX}levels_total"] == sum(figure["levels"] for figure in figures)
        assert seen[f"{PREFIX}nodes_made_total"] == sum(figure["nodes_made"] for figure in figures)
        assert seen[f"{PREFIX}nodes_pruned_total"] == sum(figure["nodes_pruned"] for figure in figures)
        assert seen[f"{PREFIX}prm_tokens_total"] == sum(figure["prm_tokens"] for figure in figures)
        generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
        assert seen[f"{PREFIX}generated_tokens_total"] == generated
        assert seen[f"{PREFIX}kv_freed_tokens_total"] > 0
        assert seen[f"{PREFIX}solver_seconds_count"] == sum(figure["solver"]["calls"] for figure in figures)
        rare = {f"{PREFIX}rebase_fallbacks_total"}
        assert {name for metric in METRICS for name in metric.exposed_names} - set(seen) <= rare
        lines = [line for line in server.log.read_text(errors="replace").splitlines() if " complete in " in line]
        assert len(lines) == len(answers)
