"""Clusters on cases that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_ets.clusters import cluster_labels, cosine_distances, first_occurrence_labels


def at(*degrees: float) -> np.ndarray:  # type: ignore[type-arg]
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_labels_follow_the_first_occurrence() -> None:
    assert cluster_labels(at(90, 0, 91, 1), 0.05).tolist() == [0, 1, 0, 1]
    assert first_occurrence_labels(np.array([7, 2, 7, 9])).tolist() == [0, 1, 0, 2]


def test_linkage_is_average() -> None:
    # 0 and 20 degrees join first (.060); 40 is .060 from 20 but .234 from 0: .147 on average
    assert cluster_labels(at(0, 20, 40), 0.14).max() + 1 == 2
    assert cluster_labels(at(0, 20, 40), 0.16).max() + 1 == 1


def test_length_does_not_matter_and_opposites_are_far() -> None:
    distances = cosine_distances(at(0, 0, 180) * np.array([[1], [5], [2]], dtype=np.float32))
    assert distances == pytest.approx(np.array([[0, 0, 2], [0, 0, 2], [2, 2, 0]]), abs=1e-6)


def test_small_levels_and_zero_vectors() -> None:
    assert cluster_labels(np.zeros((1, 3), dtype=np.float32), 0.05).tolist() == [0]
    assert cluster_labels(np.zeros((0, 3), dtype=np.float32), 0.05).tolist() == []
    assert cluster_labels(np.array([[0, 0], [1, 0], [1, 0]], dtype=np.float32), 0.5).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="finite"):
        cluster_labels(np.array([[np.nan, 1.0]], dtype=np.float32), 0.05)
