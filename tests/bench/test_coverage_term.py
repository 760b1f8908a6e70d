"""The coverage bench: its grid, its weak PRM and its summary, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.coverage_term import MODELS, grid, markdown, plot, tables, weak_prm


def row(policy: str, problem: str, is_right: bool, held: float, prm: str) -> dict[str, Any]:
    made = {"prm": prm, "setting": f"{policy}@16", "policy": policy, "width": 16, "problem": problem, "seed": 0}
    return made | {"is_right": is_right, "kv_tokens_mean": held, "completion_tokens": 100, "seconds": 1.0}


def test_a_grid_has_the_baselines_and_every_pair_of_weights() -> None:
    names = [setting.name for setting in grid(16, [1.0, 2.0], [0.0, 1.5])]
    pairs = ["ets b=1 d=0", "ets b=1 d=1.5", "ets reward b=1", "ets b=2 d=0", "ets b=2 d=1.5", "ets reward b=2"]
    assert names == ["rebase", "best_of_n", "dvts", *pairs]


def test_the_weak_prm_is_the_policy_model_in_the_format_of_the_strong_one(tmp_path: Path) -> None:
    folder = weak_prm(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (MODELS / "policy" / "model.safetensors").read_bytes()
    assert json.loads((folder / "prm_config.json").read_text()) == json.loads(
        (MODELS / "prm" / "prm_config.json").read_text()
    )


def test_each_prm_has_its_own_table_and_panel(tmp_path: Path) -> None:
    done = [row("rebase", "a", True, 100, "weak"), row("ets b=1 d=0", "a", False, 50, "weak")]
    assert list(tables(done, seed=0)) == ["weak"]
    made = tables(
        [*done, row("rebase", "a", True, 80, "strong"), row("rebase", "a", True, 1, "strong") | {"seed": 1}], seed=0
    )
    assert [s["kv_tokens_mean"] for _, summaries in made.values() for s in summaries] == [80, 50, 100]
    text = markdown(made)
    assert text.index("strong PRM") < text.index("| rebase | 16 | 1 | 1.000 |") < text.index("weak PRM")
    assert "| ets b=1 d=0 | 16 | 1 | 0.000 | -1.000 [-1.000, -1.000] |" in text.split("weak PRM")[1]
    plot(made, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
