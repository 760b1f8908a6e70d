"""The bench of embeddings: its figures where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from bench.cluster_variants import Steps, figures, normalised, symbols

NOISE = 0.02


def steps(common: float, count: int = 6) -> list[Steps]:
    """Levels of two meanings along two axes, with a common direction of the given size and a little noise."""
    draw = np.random.default_rng(0)
    made = []
    for level in range(count):
        tree = level // 2
        kinds = [0, 0, 0, 1, 1, 1]
        axes = np.eye(8)[kinds] + NOISE * draw.normal(size=(6, 8))
        axes[:, 7] += common
        made.append(
            Steps(
                tree,
                tuple(f"text {place}" for place in range(6)),
                tuple(str(kind) for kind in kinds),
                {(-1, "mean"): axes.astype(np.float32)},
            )
        )
    return made


def test_separate_meanings_are_found_with_the_right_number_of_clusters() -> None:
    found = steps(common=0.0)
    result = figures(found, [level.embeddings[-1, "mean"] for level in found])
    assert (result["auc"], result["purity"], result["meanings"]) == (1.0, 1.0, 2.0)
    assert (result["pairs_same"], result["pairs_other"]) == (6 * 6, 6 * 9)
    assert result["median_same"] < result["suggested_cut"] < result["median_other"]


def test_a_common_direction_shrinks_distances_and_centring_gives_them_back() -> None:
    found = steps(common=10.0)
    sets = [level.embeddings[-1, "mean"] for level in found]
    trees_of = [level.tree for level in found]
    raw = figures(found, normalised(sets, trees_of, "raw"))
    for how in ("centred on all", "centred on the search so far", "centred on other prompts"):
        centred = figures(found, normalised(sets, trees_of, how))
        assert raw["median_other"] < 0.05 < centred["median_other"]
        assert centred["auc"] == pytest.approx(1.0)


def test_the_search_so_far_and_other_prompts_are_what_they_say() -> None:
    sets = [np.array(rows, dtype=np.float32) for rows in ([[1, 0], [3, 0]], [[6, 1], [6, 3]], [[0, 8], [0, 4]])]
    so_far = normalised(sets, [0, 0, 1], "centred on the search so far")
    assert [level.tolist() for level in so_far] == [[[-1, 0], [1, 0]], [[2, 0], [2, 2]], [[0, 2], [0, -2]]]
    others = normalised(sets, [0, 0, 1], "centred on other prompts")
    assert [level.tolist() for level in others] == [[[1, -6], [3, -6]], [[6, -5], [6, -3]], [[-4, 7], [-4, 3]]]


def test_symbols_are_numbers_and_operators_in_order() -> None:
    assert symbols("So 3 * 4.5 = 13.5 eggs.") == symbols("thus 3*4.5=13.5") == "3 * 4.5 = 13.5"
    assert symbols("no numbers here") == ""
