"""The runner of searches: its grids, the rule by which weights are chosen, what is still to do, tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from bench import figures, real_model, rows, searches
from bench.searches import GRIDS, MODELS, Setting, grid_of, parsed

REWARD = {"algorithm": "ets", "coverage": "reward"}


def names(grid: str, *argv: str) -> list[str]:
    plan = grid_of(grid, parsed(["--widths", "16", *argv]))
    return [setting.name for setting in plan.settings(plan)]


def row(policy: str, problem: str, is_right: bool, held: float, **more: Any) -> rows.Row:
    made = {"setting": f"{policy}@16", "policy": policy, "width": 16, "problem": problem, "seed": 0, "prm": "strong"}
    made |= {"split": "test", "is_right": is_right, "kv_tokens_mean": held, "completion_tokens": 100, "seconds": 1.0}
    return made | more


def test_grids_have_every_combination_and_the_policies_they_are_compared_with() -> None:
    weights = ("--kv-weights", "1", "2", "--diversity-weights", "0", "1.5")
    plain = ["best_of_n", "dvts", "rebase"]
    assert names("sweep", *weights) == [*plain, "ets b=1 d=0", "ets b=1 d=1.5", "ets b=2 d=0", "ets b=2 d=1.5"]
    coverage = [f"ets{what}" for b in "12" for what in (f" b={b} d=0", f" published b={b} d=1.5", f" b={b}")]
    assert names("coverage", *weights) == [*plain, *coverage]
    footprint = ["greedy", "self_consistency", "best_of_n", "beam", "dvts", "dora", "particles", "subpool", "rebase"]
    assert names("kv_footprint", "--kv-weights", "4") == [*footprint, "ets_kv b=4", "ets b=4", "ets uniform b=4"]
    assert names("cuts", "--cuts", "0.1", "0.2") == ["ets b=1 d=1.5 cut=0.1", "ets b=1 d=1.5 cut=0.2"]
    stops = ("off", "settled", "likely 0.95", "likely 0.8")
    assert names("stopping") == [f"{policy}, {stop}" for policy in ("best_of_n", "rebase", "ets b=4") for stop in stops]
    assert names("sweep", "--only", "rebase", "ets b=4 d=0") == ["rebase", "ets b=4 d=0"]


def test_a_name_says_what_the_server_is_asked_for() -> None:
    asked = {s.name: s.search for grid in GRIDS.values() for s in grid.settings(grid)}
    assert asked["ets b=4"] == {**REWARD, "kv_cost_weight": 4.0}
    assert asked["ets b=4 d=1"] == {**REWARD, "kv_cost_weight": 4.0, "diversity_weight": 1.0}
    assert asked["ets uniform b=2"] == {"algorithm": "ets", "coverage": "uniform", "kv_cost_weight": 2.0}
    assert asked["ets published b=2 d=1.5"].items() >= {**searches.PUBLISHED, "diversity_weight": 1.5}.items()
    assert asked["ets b=1 d=1.5 cut=0.3"]["cluster_distance"] == 0.3
    assert asked["ets_kv b=1"] == {"algorithm": "ets_kv", "kv_cost_weight": 1.0}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_smoke_is_small_and_every_policy_of_the_rows_is_still_in_its_grid(grid: str) -> None:
    smoke = grid_of(grid, parsed(["--smoke"]))
    assert smoke.problems * len(smoke.settings(smoke)) <= 24 and smoke.test_problems <= 2
    whole = grid_of(grid, parsed([]))
    keys = {(setting.name, figures.weight(setting.name, "b")) for setting in whole.settings(whole)}
    assert {row["policy"] for row in rows.read(rows.RESULTS / f"{grid}.jsonl")} <= {name for name, _ in keys}


def test_chosen_is_the_least_kv_that_is_as_accurate_as_rebase() -> None:
    def summary(policy: str, accuracy: float, held: float) -> dict[str, Any]:
        return {"policy": policy, "accuracy": accuracy, "kv_tokens_mean": held}

    base = [summary("rebase", 0.80, 900), summary("dvts", 0.9, 1)]
    within = [summary("ets b=1 d=1", 0.79, 500), summary("ets b=2 d=1", 0.85, 600)]
    below = [summary("ets b=4 d=1", 0.78, 300)]
    assert searches.chosen([*base, *within, *below]) == "ets b=1 d=1"
    none = [*base, *below, summary("ets b=4 d=0", 0.7, 100)]
    assert searches.chosen(none) == "ets b=4 d=1", "the most accurate one"


def test_the_weak_prm_is_the_policy_model_in_the_format_of_the_strong_one(tmp_path: Path) -> None:
    folder = searches.weak_prm(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (MODELS / "policy" / "model.safetensors").read_bytes()
    assert (folder / "prm_config.json").read_bytes() == (MODELS / "prm" / "prm_config.json").read_bytes()


def test_a_run_goes_on_where_its_split_prm_and_seed_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "problems_of", lambda _split, count, _seed: [{"prompt": p} for p in "abc"[:count]])
    monkeypatch.setattr(
        searches, "solve", lambda _client, setting, problem, _seed: row(setting.name, problem["prompt"], True, 1, latency_s=8.0)
    )  # fmt: skip
    out = tmp_path / "rows.jsonl"
    rows.append(out, row("rebase", "a", True, 1))
    for other in ({"prm": "weak"}, {"split": "validation"}, {"seed": 1}):
        rows.append(out, row("rebase", "b", True, 1) | other)
    settings = [Setting(name, 16, {"algorithm": name}) for name in ("rebase", "dvts")]
    searches.Runner([cast(Any, None)], 4, "strong", 0).run(settings, "test", 2, out)
    made = list(rows.read(out))[4:]
    assert [(one["policy"], one["problem"], one["seconds"]) for one in made] == [
        ("dvts", "a", 2.0), ("rebase", "b", 2.0), ("dvts", "b", 2.0),
    ]  # fmt: skip


def test_splits_and_prms_have_tables_of_their_own() -> None:
    weak = [row("rebase", "a", True, 100, prm="weak"), row("ets b=1 d=0", "a", False, 50, prm="weak")]
    other = [row("rebase", "a", True, 80), row("rebase", "a", True, 1, seed=1)]
    other.append(row("rebase", "a", True, 9, split="validation"))
    text = searches.report("coverage", [*weak, *other], seed=0)
    titles = [line for line in text.splitlines() if line and not line.startswith("|")]
    assert titles == ["validation problems, strong PRM", "test problems, weak PRM", "test problems, strong PRM"]
    assert "| ets b=1 d=0 | 16 | 1 | 0.000 | -1.000 [-1.000, -1.000] | 50 |" in text
    assert "| rebase | 16 | 1 | 1.000 |  | 80 |" in text


def test_a_cut_is_the_mean_of_its_problems_however_many_a_row_has() -> None:
    seen = {"leaves": 8.0, "distinct_texts": 6.0, "distinct_meanings": 3.0, "clusters": 2.0, "purity": 0.5}
    several = [{"policy": "ets cut=0.1", "problems": 40, "kv_tokens_mean": 9.0, "is_right": 0.75, **seen}]
    assert searches.cut_table(several).splitlines()[-1] == "| 0.1 | 8.0 | 6.0 | 3.0 | 2.0 | 0.500 | 9 | 30/40 |"
    single = [row("ets cut=0.2", name, name == "a", held, **seen) for name, held in (("a", 10), ("b", 20))]
    both = searches.cut_table([*several, *single]).splitlines()[2:]
    assert both == ["| 0.2 | 8.0 | 6.0 | 3.0 | 2.0 | 0.500 | 15 | 1/2 |"]


def test_a_picture_has_a_panel_for_each_width_with_points_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    made: list[Any] = []
    monkeypatch.setattr(pyplot, "close", made.append)
    policies = ["rebase", "dvts", "dora", "beam", "ets b=2", "ets b=4 d=0"]
    done = [row(policy, "a", True, 10 * at + 10) for at, policy in enumerate(policies)]
    done += [row("rebase", "a", True, 10, width=64, setting="rebase@64")]
    searches.report("kv_footprint", done, 0, tmp_path / "plot.png")
    (axis,) = made[0].axes
    monkeypatch.undo()
    pyplot.close(made[0])
    assert axis.get_title() == "width 16, test problems, strong PRM"
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["not dominated", *(f"{policy} (1)" for policy in sorted(policies))]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_colour_is_of_a_policy_whatever_its_weights() -> None:
    every = {s.name for grid in GRIDS.values() for s in grid.settings(grid) if s.search} | set(real_model.POLICIES)
    assert {figures.colour(name) for name in every} == set(figures.COLOURS.values())
    assert figures.colour("ets b=4 d=0") == figures.colour("ets_kv b=1") == figures.COLOURS["ets_kv"]
    assert figures.colour("ets b=4") == figures.colour("ets b=1 d=1.5 cut=0.1") == figures.COLOURS["ets"]


def test_searches_that_end_early_are_compared_problem_by_problem_with_those_that_do_not() -> None:
    done = [
        row("rebase, off", "1+1", True, 10, answer="2", levels=8),
        row("rebase, off", "1+2", True, 10, answer="3", levels=8),
        row("rebase, likely 0.8", "1+1", True, 10, answer="2", levels=4, completion_tokens=50),
        row("rebase, likely 0.8", "1+2", False, 10, answer="4", levels=6, completion_tokens=80),
        row("rebase, likely 0.8", "9+9", False, 10, answer="4", levels=1),  # never searched to the end: left out
    ]
    off, likely = (line.split(" | ") for line in searches.stopping_table(done).splitlines()[2:][::-1])
    assert off[2:] == ["off", "2/2", "0/2", "0.0%", "0.0%", "0.0% |"]
    assert likely[2:] == ["likely 0.8", "1/2", "1/2", "35.0%", "37.5%", "0.0% |"]
