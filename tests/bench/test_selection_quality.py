"""The bench that judges selections: its levels, costs and shares on a tree small enough to see through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.studies.selection_quality import judged_levels, quality
from bench.testbed.task import Problem
from sglang_ets.core.config import SearchConfig

PROBLEM = Problem("1+2+3", 6)


def node(number: int, parent: int, depth: int, text: str, score: float, axis: int) -> dict[str, Any]:
    embedding = [float(place == axis) for place in range(3)]
    made = {"id": number, "parent": parent, "depth": depth, "text": text, "score": score, "embedding": embedding}
    return made | {
        "token_ids": [ord(letter) for letter in text],
        "finish": "step",
        "state": "retained",
        "allocation": 1,
    }


NODES = [
    node(1, 0, 1, "so 1+2=3:3+3\n", 0.9, 0),
    node(2, 0, 1, "so 1+2=3:3+3\n", 0.9, 0),
    node(3, 0, 1, "so 1+2=4:4+3\n", 0.9, 1),
    node(4, 1, 2, "so 3+3=6:The answer is 6", 0.9, 0),  # all leaves of its level are right: nothing to judge
]


def test_a_level_counts_equal_paths_once_and_knows_the_truth() -> None:
    (judged,) = judged_levels(NODES, PROBLEM)
    assert judged.is_right.tolist() == [True, True, False]
    assert judged.level.kv.cost.tolist() == [7.0, 6.0, 6.0]  # all share how they begin, and two the rest
    assert judged.level.nodes.cost.tolist() == [1.0, 1.0, 1.0]
    assert judged.level.kv.share_held(np.array([True, False, False])) == pytest.approx(13 / 19)
    assert judged.level.nodes.share_held(np.array([True, False, True])) == pytest.approx(2 / 3)


def test_coverage_keeps_the_wrong_meaning_too() -> None:
    judged = list(judged_levels(NODES, PROBLEM))
    greedy = quality(judged, SearchConfig(width=3, kv_cost_weight=4.0, diversity_weight=0.0))
    covering = quality(judged, SearchConfig(width=3, kv_cost_weight=4.0, diversity_weight=100.0))
    assert (greedy["kv_kept"], greedy["right_kept"], greedy["all_right_lost"]) == (13 / 19, 1.0, 0.0)
    assert (covering["kv_kept"], covering["right_kept"]) == (1.0, pytest.approx(2 / 3))
