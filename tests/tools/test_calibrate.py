"""The suggested cut: where two groups of distances part."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_ets.tools.calibrate import histogram, level_embeddings, pair_distances, suggest_cut


def test_cut_lies_between_two_groups() -> None:
    draw = np.random.default_rng(0)
    same, other = 10 ** draw.normal(-3, 0.2, 200), 10 ** draw.normal(-0.8, 0.2, 300)
    cut = suggest_cut(np.concatenate([same, other]))
    assert same.max() < cut < other.min()
    assert sum("suggested" in line for line in histogram(np.concatenate([same, other]), cut).splitlines()) == 1


def test_too_few_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="more prompts"):
        suggest_cut(np.array([0.1, 0.1]))


def test_pairs_of_one_text_do_not_count() -> None:
    embeddings = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    assert pair_distances(["a", "a", "b"], embeddings).tolist() == pytest.approx([1.0, 1.0])


def test_levels_hold_unfinished_leaves_with_an_embedding() -> None:
    nodes = [
        {"depth": 1, "finish": "step", "text": "a", "embedding": [1.0, 0.0]},
        {"depth": 1, "finish": "stop", "text": "b", "embedding": [0.0, 1.0]},
        {"depth": 2, "finish": "step", "text": "c", "embedding": None},
        {"depth": 2, "finish": "step", "text": "d", "embedding": [0.0, 1.0]},
    ]
    assert [texts for texts, _ in level_embeddings(nodes)] == [["a"], ["d"]]
