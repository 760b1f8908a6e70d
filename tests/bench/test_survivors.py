"""What grew below the leaves that a selection keeps, on a tree small enough to see through."""

from __future__ import annotations

from typing import Any

import pytest

from bench.studies import survivors
from sglang_ets.core.config import SearchConfig
from sglang_ets.math_process import MathProcess
from sglang_ets.tools.evaluate import Grader
from tests.bench.test_stopping_replay import node, row

SCORES = {1: 0.9, 2: 0.5, 3: 0.1, 4: 0.7}


def tree() -> list[dict[str, Any]]:
    """Four leaves of two tokens each, which share none; 1 and 2 come to 3, 4 to 8, and 3 was given up."""
    firsts = [node(i, 0, 1, 2, "pruned" if i == 3 else "retained", score) for i, score in SCORES.items()]
    ends = [node(i + 4, i, 2, 3, "complete", 0.9, "8" if i == 4 else "3") for i in SCORES if i != 3]
    for one in (*firsts, *ends):
        one |= {"allocation": int(one["state"] == "retained"), "token_ids": [10 * one["id"] + i for i in (0, 1)]}
    return firsts + ends


def test_a_leaf_is_right_if_a_trajectory_below_it_is_and_the_given_up_one_is_left_out() -> None:
    grader = Grader(MathProcess())
    (known,) = survivors.known_levels(row("rebase", tree(), "3"), grader)
    assert not list(survivors.known_levels(row("rebase", tree(), "5"), grader)), "nothing is right: nothing to lose"
    made = survivors.figures_of([row("rebase", tree(), "8"), row("ets", tree(), "8")], grader)
    grader.process.stop()
    assert known.is_right.tolist() == [True, True, False] and known.level.scores.tolist() == [0.9, 0.5, 0.7]
    assert [set(answers) for answers in known.answers] == [{"3"}, {"3"}, {"8"}]
    assert {(data, width, found["levels"]) for (data, width, _), found in made.items()} == {("toy", 4, 1)}
    assert {name for _, _, name in made} == {name for name, _ in survivors.settings(4)}


def test_what_is_lost_is_held_against_chance() -> None:
    grader = Grader(MathProcess())
    known = list(survivors.known_levels(row("rebase", tree(), "8"), grader))
    grader.process.stop()
    whole = survivors.quality(known, SearchConfig("best_of_n", 4))
    assert (whole["kv_kept"], whole["answers_kept"], whole["lost"], whole["lost_by_chance"]) == (1.0, 1.0, 0.0, 0.0)
    best_only = survivors.quality(known, SearchConfig("rebase", 4, rebase_temperature=0.01))
    assert best_only["kept"] == best_only["kv_kept"] == pytest.approx(1 / 3)
    assert (best_only["answers_kept"], best_only["right_width"], best_only["lost"]) == (0.5, 0.0, 1.0)
    assert best_only["lost_by_chance"] == pytest.approx(2 / 3), "of one right leaf among three, one is drawn"
