"""The sweep: its grid, and the rule by which weights are chosen on validation problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.sweep import chosen, grid, plain_settings, plot, split_tables


def summary(policy: str, accuracy: float, held: float) -> dict[str, Any]:
    return {"policy": policy, "accuracy": accuracy, "kv_tokens_mean": held}


def test_a_grid_has_every_pair_of_weights_and_says_so_to_the_server() -> None:
    made = grid(16, [0.5, 4.0], [0.0, 1.0])
    assert [setting.name for setting in made] == ["ets b=0.5 d=0", "ets b=0.5 d=1", "ets b=4 d=0", "ets b=4 d=1"]
    assert made[1].search == {"algorithm": "ets", "coverage": "reward", "kv_cost_weight": 0.5, "diversity_weight": 1.0}
    assert [setting.name for setting in plain_settings(16)] == ["best_of_n", "dvts", "rebase"]


def test_chosen_is_the_least_kv_that_is_as_accurate_as_rebase() -> None:
    base = [summary("rebase", 0.80, 900), summary("dvts", 0.9, 1)]
    within = [summary("ets b=1 d=1", 0.79, 500), summary("ets b=2 d=1", 0.85, 600)]
    below = [summary("ets b=4 d=1", 0.78, 300)]
    assert chosen([*base, *within, *below]) == "ets b=1 d=1"
    assert chosen([*base, *below, summary("ets b=4 d=0", 0.7, 100)]) == "ets b=4 d=1"  # none is: the most accurate


def test_splits_are_never_mixed(tmp_path: Path) -> None:
    def row(split: str, policy: str, is_right: bool) -> dict[str, Any]:
        made = {"split": split, "setting": f"{policy}@4", "policy": policy, "width": 4, "problem": "p", "seed": 0}
        return made | {"is_right": is_right, "kv_tokens_mean": 9.0, "completion_tokens": 1, "seconds": 1.0}

    done = [row("validation", "rebase", True), row("validation", "ets b=1 d=0", True), row("test", "rebase", False)]
    tables = split_tables([*done, {**row("test", "rebase", True), "seed": 1}], seed=0)
    assert [s["accuracy"] for s in tables["test"][1]] == [0.0]
    assert len(tables["validation"][1]) == 2
    plot(tables["validation"][1], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
