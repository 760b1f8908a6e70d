"""What the trajectories of a search hold, counted by hand."""

from __future__ import annotations

import pytest

from bench.studies import answers
from sglang_ets.math_process import MathProcess
from sglang_ets.tools.evaluate import Grader
from tests.bench.test_stopping_replay import FREE, LEVELS, row


def test_right_ones_are_counted_among_the_trajectories_and_not_only_the_chosen_one() -> None:
    grader = Grader(MathProcess())
    pruned = row("ets", LEVELS, "3") | {"is_right": False}  # its two last vote for 8
    pruned["search_result"] |= {"preset": "paper"}
    made = answers.figures([row("best_of_n", FREE, "3") | {"is_right": True}, pruned], grader)
    grader.process.stop()
    free, levels = made["toy", 4, "best_of_n"], made["toy", 4, "ets published"]
    assert (free["chosen_right"], free["any_right"], free["majority_right"], free["share_right"]) == (1, 1, 1, 0.75)
    assert (levels["chosen_right"], levels["any_right"], levels["majority_right"]) == (0, 1, 0)
    assert free["different"] == levels["different"] == 2
    assert free["auc"] == levels["auc"] == 0.0, "in both the wrong ones score higher"


def test_a_search_without_right_or_wrong_ones_has_no_auc() -> None:
    grader = Grader(MathProcess())
    made = answers.figures([row("ets", LEVELS, "5") | {"is_right": False}], grader)["toy", 4, "ets b=4"]
    grader.process.stop()
    assert made["auc"] is None and made["auc_problems"] == 0 and made["share_right"] == pytest.approx(0.0)
    *_, line = answers.table([{"data": "toy", "width": 4, "policy": "ets", **made}]).splitlines()
    assert line == "| toy | 4 | ets | 1 | 0 | 0 | 0 | 0.0% | 2.0 |  |"
