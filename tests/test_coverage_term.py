"""The coverage bench: its grid, its weak PRM and its summary, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.coverage_term import MODELS, Grid, summaries, table, weak_prm


def row(policy: str, problem: str, is_right: bool, held: float) -> dict[str, Any]:
    made = {"prm": "weak", "policy": policy, "problem": problem, "is_right": is_right, "kv_tokens_mean": held}
    return made | {"distinct_meanings": 3.0, "clusters": None}


def test_a_grid_has_the_baselines_and_every_pair_of_weights() -> None:
    names = [setting.name for setting in Grid(16, [1.0, 2.0], [0.0, 1.5]).settings()]
    pairs = ["ets b=1 d=0", "ets b=1 d=1.5", "ets reward b=1", "ets b=2 d=0", "ets b=2 d=1.5", "ets reward b=2"]
    assert names == ["rebase", "best_of_n", "dvts", *pairs]


def test_the_weak_prm_is_the_policy_model_in_the_format_of_the_strong_one(tmp_path: Path) -> None:
    folder = weak_prm(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (MODELS / "policy" / "model.safetensors").read_bytes()
    assert json.loads((folder / "prm_config.json").read_text()) == json.loads(
        (MODELS / "prm" / "prm_config.json").read_text()
    )


def test_only_problems_that_all_settings_have_solved_are_compared() -> None:
    done = [row("rebase", "a", True, 100), row("rebase", "b", False, 100), row("ets b=1 d=0", "a", True, 50)]
    base, ets = summaries(done, seed=0)
    assert (base["problems"], base["accuracy"], ets["kv_reduction"], ets["difference"]) == (1, 1.0, 2.0, 0.0)
    assert "| weak | ets b=1 d=0 | 1 | 1.000 | +0.000 [+0.000, +0.000] |" in table([base, ets])
