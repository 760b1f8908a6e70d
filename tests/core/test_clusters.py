"""Clusters on cases that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_ets.core.clusters import RunningCenter, cluster_labels, cosine_distances, first_occurrence_labels


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


def test_zero_vectors_are_one_and_far_from_all_else() -> None:
    distances = cosine_distances(np.array([[0, 0], [0, 0], [1, 0]], dtype=np.float32))
    assert distances.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def test_the_center_is_the_mean_of_this_and_all_levels_before() -> None:
    center = RunningCenter()
    first = np.array([[9, 1], [9, -1]], dtype=np.float32)
    assert center.centered(first).tolist() == [[0, 1], [0, -1]]
    second = np.array([[9, 3], [9, 3]], dtype=np.float32)  # mean of all four: (9, 1.5)
    assert center.centered(second).tolist() == [[0, 1.5], [0, 1.5]]
    assert first.tolist() == [[9, 1], [9, -1]], "what comes in stays as it is"


def test_a_shared_direction_hides_meanings_until_it_is_taken_off() -> None:
    meanings = np.repeat(np.eye(4, dtype=np.float32), 4, axis=0)
    draw = np.random.default_rng(0)
    embeddings = meanings + 20.0 + draw.normal(scale=0.05, size=(16, 4)).astype(np.float32)
    assert cluster_labels(embeddings, 0.3).max() + 1 == 1
    assert cluster_labels(RunningCenter().centered(embeddings), 0.3).tolist() == np.repeat(np.arange(4), 4).tolist()


def test_what_differs_by_rounding_alone_is_one_cluster() -> None:
    embeddings = np.ones((6, 8), dtype=np.float32) + np.random.default_rng(1).normal(scale=1e-6, size=(6, 8)).astype(
        np.float32
    )
    assert cluster_labels(RunningCenter().centered(embeddings), 0.3).tolist() == [0] * 6
