"""The bench of embeddings: its figures where the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.studies.cluster_variants import Steps, figures, levels, normalised, symbols

NOISE = 0.02


def steps(common: float, count: int = 6) -> list[Steps]:
    """Levels of two meanings along two axes, with a common direction of the given size and a little noise."""
    draw = np.random.default_rng(0)
    made = []
    for level in range(count):
        axes = np.eye(8)[[0, 0, 0, 1, 1, 1]] + NOISE * draw.normal(size=(6, 8))
        axes[:, 7] += common
        made.append(Steps(level // 2, tuple(f"text {at}" for at in range(6)), tuple("000111"), axes.astype(np.float32)))
    return made


def test_a_level_has_each_step_once_and_only_those_that_mean_something() -> None:
    def node(number: int, text: str, finish: str = "step", depth: int = 1) -> dict[str, Any]:
        made = {"id": number, "parent": 0, "depth": depth, "text": text, "finish": finish}
        return made | {"embedding": [float(number)] if finish == "step" else None}

    nodes = [
        node(1, "a 1"),
        node(2, "a 1"),
        node(3, "b 2"),
        node(4, "none"),
        node(5, "c 3", "stop"),
        node(6, "d 4", depth=2),
    ]
    (level,) = levels(iter([nodes]), symbols)
    assert (level.texts, level.meanings, level.embeddings.tolist()) == (("a 1", "b 2"), ("1", "2"), [[2.0], [3.0]])


def test_separate_meanings_are_found_with_the_right_number_of_clusters() -> None:
    found = steps(common=0.0)
    result = figures(found, normalised(found, "raw"))
    assert (result["auc"], result["purity"], result["meanings"]) == (1.0, 1.0, 2.0)
    assert (result["pairs_same"], result["pairs_other"]) == (6 * 6, 6 * 9)
    assert result["median_same"] < result["suggested_cut"] < result["median_other"]


def test_a_common_direction_shrinks_distances_and_centring_gives_them_back() -> None:
    found = steps(common=10.0)
    raw = figures(found, normalised(found, "raw"))
    for how in ("centred on all", "centred on the search so far", "centred on other prompts"):
        centred = figures(found, normalised(found, how))
        assert raw["median_other"] < 0.05 < centred["median_other"]
        assert centred["auc"] == pytest.approx(1.0)


def test_the_search_so_far_and_other_prompts_are_what_they_say() -> None:
    sets = [[[1, 0], [3, 0]], [[6, 1], [6, 3]], [[0, 8], [0, 4]]]
    found = [Steps(tree, (), (), np.array(own, dtype=np.float32)) for tree, own in zip((0, 0, 1), sets, strict=True)]
    so_far = normalised(found, "centred on the search so far")
    assert [level.tolist() for level in so_far] == [[[-1, 0], [1, 0]], [[2, 0], [2, 2]], [[0, 2], [0, -2]]]
    others = normalised(found, "centred on other prompts")
    assert [level.tolist() for level in others] == [[[1, -6], [3, -6]], [[6, -5], [6, -3]], [[-4, 7], [-4, 3]]]


def test_symbols_are_numbers_and_operators_in_order() -> None:
    assert symbols("So 3 * 4.5 = 13.5 eggs.") == symbols("thus 3*4.5=13.5") == "3 * 4.5 = 13.5"
    assert symbols("no numbers here") == ""
