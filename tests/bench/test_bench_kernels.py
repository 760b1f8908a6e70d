"""The kernel bench runs in smoke mode and leaves rows which say where they come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


def test_smoke_mode_appends_complete_rows(tmp_path: Path) -> None:
    output = tmp_path / "kernels.jsonl"
    output.write_text('{"kept": true}\n', encoding="utf-8")
    command = [sys.executable, "-m", "bench.bench_kernels", "--smoke", "--out", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    kept, *rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert kept == {"kept": True}
    timed = {(row["kernel"], row["implementation"]) for row in rows if row["device"] == "cpu"}
    assert {(kernel, "reference") for kernel in ("step_pool", "step_score", "pairwise_cosine")} <= timed
    assert len(timed) == 6, "each kernel is timed beside its baseline"
    for row in rows:
        assert row["smoke"] is True and row["made_by"]["commit"] and row["made_by"]["hardware"]
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["requested_bytes"] >= row["lower_bound_bytes"] > 0
    assert "| step_pool |" in done.stdout
