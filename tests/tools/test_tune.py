"""What grew below the leaves that a selection keeps, on a tree small enough to see through, and what is suggested."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_ets.core.config import SearchConfig
from sglang_ets.flags import add_flags, from_namespace
from sglang_ets.math_process import MathProcess
from sglang_ets.tools import tune
from sglang_ets.tools.evaluate import Grader
from sglang_ets.tools.tune import KnownLevel, Quality
from tests.bench.test_stopping_replay import node, row

SCORES = {1: 0.9, 2: 0.5, 3: 0.1, 4: 0.7}


def tree(*, embeddings: bool = False) -> list[dict[str, Any]]:
    """Four leaves of two tokens each, which share none; 1 and 2 come to 3, 4 to 8, and 3 was given up."""
    firsts = [node(i, 0, 1, 2, "pruned" if i == 3 else "retained", score) for i, score in SCORES.items()]
    ends = [node(i + 4, i, 2, 3, "complete", 0.9, "8" if i == 4 else "3") for i in SCORES if i != 3]
    for one in (*firsts, *ends):
        one |= {"allocation": int(one["state"] == "retained"), "token_ids": [10 * one["id"] + i for i in (0, 1)]}
        one["embedding"] = [1.0, float(one["id"])] if embeddings else None
    return firsts + ends


def known(expected: str) -> list[KnownLevel]:
    grader = Grader(MathProcess())
    try:
        return list(tune.known_levels(tree(), expected, "boxed", grader, search=0))
    finally:
        grader.process.stop()


def test_a_leaf_is_right_if_a_trajectory_below_it_is_and_the_given_up_one_is_left_out() -> None:
    (one,) = known("3")
    assert one.is_right.tolist() == [True, True, False] and one.level.scores.tolist() == [0.9, 0.5, 0.7]
    assert [set(answers) for answers in one.answers] == [{"3"}, {"3"}, {"8"}]
    assert not known("5"), "nothing is right: nothing to lose"


def test_what_is_lost_is_held_against_chance() -> None:
    whole = tune.quality(known("8"), {"algorithm": "best_of_n"}, 4)
    assert (whole.kv_kept, whole.answers_kept, whole.lost, whole.lost_by_chance) == (1.0, 1.0, 0.0, 0.0)
    best_only = tune.quality(known("8"), {"algorithm": "rebase", "rebase_temperature": 0.01}, 4)
    assert best_only.kept == best_only.kv_kept == pytest.approx(1 / 3)
    assert (best_only.answers_kept, best_only.right_width, best_only.lost) == (0.5, 0.0, 1.0)
    assert best_only.lost_by_chance == pytest.approx(2 / 3), "of one right leaf among three, one is drawn"


def test_one_lost_level_loses_a_search() -> None:
    """The last right leaf of the first search is lost at one of its three levels, and the second search loses none."""
    (lost,), (kept,) = known("8"), known("3")
    best_only = {"algorithm": "rebase", "rebase_temperature": 0.01}
    levels = [replace(kept, search=1), replace(kept, search=1), replace(lost, search=1), replace(kept, search=2)]
    found = tune.quality(levels, best_only, 4)
    assert (found.lost, found.searches_lost) == (0.25, 0.5)


def test_the_least_kv_within_the_tolerance_is_suggested() -> None:
    found = {
        "rebase": Quality(0.9, 0.9, 1, 1, 0, 0, 0.02),
        "careful": Quality(0.7, 0.7, 1, 1, 0, 0, 0.06),
        "bold": Quality(0.3, 0.3, 1, 1, 0, 0, 0.2),
    }
    assert [tune.suggested(found, tolerance) for tolerance in (0.0, 0.05, 0.5)] == ["rebase", "careful", "bold"]


@pytest.mark.parametrize(("name", "settings"), list(tune.candidates()))
def test_a_suggestion_is_flags_that_the_server_takes(name: str, settings: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given = ["--prm-format", "judge", *tune.flags_of(settings).split()]
    defaults = from_namespace(parser.parse_args(given))
    served = SearchConfig.from_request(16, None, defaults, n=None, max_tokens=None, seed=0)
    asked = SearchConfig.from_request(16, settings, {}, n=None, max_tokens=None, seed=0)
    assert served == asked, name


def file_of(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def test_the_command_shows_a_table_and_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune.main([file_of(tmp_path, row("rebase", tree(embeddings=True), "8"), row("ets", tree(), "8"))])
    said = capsys.readouterr().out
    assert "width 4, 1 levels of 1 searches" in said and "ets published" in said
    assert "suggested: --search " in said and "1 searches are few, so this is a hint" in said
    assert said.splitlines()[-1] == tune.ONE_SELECTION


def test_how_far_a_suggestion_can_be_relied_on_is_said() -> None:
    """Clopper and Pearson's interval, as tables have it: 0 of 60, and 3 of 30."""
    none = tune.reliance(frozenset({1}), frozenset({1, 2}), 60)
    assert none == "it loses 0 of 60 searches that rebase does not lose (95 %: 0% to 6% of others)"
    some = tune.reliance(frozenset({1, 2, 3, 4}), frozenset({1}), 30)
    assert "loses 3 of 30" in some and "(95 %: 2% to 27% of others)" in some and some.endswith("a hint, run 50 or more")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("ets", tree(), "8")], "searches of rebase must have one width, got none"),
        ([row("rebase", tree(), "5")], "got none in 1 searches"),
        ([row("rebase", tree(), "8")], "trees must have embeddings, got none; run with --set return_embeddings=true"),
    ],
)
def test_a_file_that_tells_nothing_is_refused(
    rows: list[dict[str, Any]], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        tune.main([file_of(tmp_path, *rows)])
    assert caught.value.code == 2 and said in capsys.readouterr().err
