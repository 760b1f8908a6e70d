"""DORA and particle filtering against the rules of their papers, written down here a second time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.particles import Particles, systematic
from sglang_ets.core.selection import Rebase
from tests.core.test_selection import level_of

SCORES = st.lists(st.integers(1, 19).map(lambda value: value / 20), min_size=1, max_size=12)


def clustered(scores: list[float], labels: list[int], width: int) -> tuple[object, SearchConfig]:
    """A level whose embeddings are equal in a cluster and at right angles between clusters."""
    level = level_of(scores, width, embeddings=np.eye(max(labels) + 1, dtype=np.float32)[labels])
    return level, SearchConfig(algorithm="dora", width=max(2, width), cluster_distance=0.3)


def dora_shares(scores: NDArray[np.float64], labels: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
    """The paper: a softmax over rewards, each weight times the leaf's uniqueness, which is 1 / (leaves that mean the same)."""
    weights = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    uniqueness = np.array([1.0 / np.sum(labels == label) for label in labels])
    return weights * uniqueness / (weights * uniqueness).sum()


@given(scores=SCORES, data=st.data(), width=st.integers(1, 64))
def test_dora_shares_by_reward_and_uniqueness(scores: list[float], data: st.DataObject, width: int) -> None:
    labels = data.draw(st.lists(st.integers(0, 3), min_size=len(scores), max_size=len(scores)))
    level, config = clustered(scores, labels, width)
    got = config.policy.select(level, config).allocation
    expected = dora_shares(np.array(scores), np.array(labels), config.rebase_temperature) * width
    assert got.sum() == width
    order = np.argsort(-expected, kind="stable")  # REBASE's rounding: each leaf in turn rounds its share of the rest up
    free, rest = width, expected.sum()
    for place in order:
        share = min(free, int(np.ceil(free * expected[place] / rest - 1e-9))) if free else 0
        assert got[place] == share or np.isclose(expected, expected[place]).sum() > 1
        free, rest = free - share, rest - expected[place]


def test_a_direction_gets_what_it_is_worth_and_not_more_for_being_common() -> None:
    level, config = clustered([0.6] * 6, [0, 0, 0, 0, 0, 1], 12)
    allocation = config.policy.select(level, config).allocation
    assert (allocation[:5].sum(), allocation[5]) == (6, 6)
    assert Rebase().select(level, config).allocation.tolist() == [2] * 6  # type: ignore[arg-type]


def test_dora_without_embeddings_is_rebase() -> None:
    level = level_of([0.9, 0.5, 0.1], 8, embeddings=None)
    config = SearchConfig(algorithm="dora", width=8)
    assert config.policy.select(level, config).allocation.tolist() == Rebase().select(level, config).allocation.tolist()


@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=9), count=st.integers(1, 40), start=st.integers(0, 99))
def test_systematic_resampling_takes_points_at_equal_distances(weights: list[int], count: int, start: int) -> None:
    if not sum(weights):
        return
    exact = np.array(weights) / sum(weights)
    counts = systematic(exact, count, start / 100)
    edges = np.concatenate([[0.0], np.cumsum(exact)])
    points = [(start / 100 + k) / count for k in range(count)]
    for place, got in enumerate(counts.tolist()):
        least = sum(edges[place] + 1e-9 < point < edges[place + 1] - 1e-9 for point in points)
        most = sum(edges[place] - 1e-9 <= point <= edges[place + 1] + 1e-9 for point in points)
        assert least <= got <= most
        assert abs(got - count * exact[place]) < 1 + 1e-6, "no leaf is more than one draw away from its share"
    assert counts.sum() == count


@given(scores=SCORES, width=st.integers(1, 32), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_particles_weigh_by_odds(scores: list[float], width: int, temperature: float) -> None:
    settings = {"temperature": temperature}
    config = SearchConfig(algorithm="particles", width=max(2, width), policy_settings=settings)
    level = level_of(scores, width)
    odds = np.array([score / (1 - score) for score in scores]) ** (1 / temperature)
    expected = systematic(odds / odds.sum(), width, float(level.rng().random()))
    got = config.policy.select(level, config).allocation
    assert got.sum() == width
    assert np.abs(got - expected).max() <= 1 and np.abs(got - width * odds / odds.sum()).max() < 1 + 1e-6


def test_particles_average_to_their_weights() -> None:
    counts = np.mean(
        [systematic(np.array([0.15, 0.25, 0.6]), 3, start) for start in np.linspace(0, 1, 1000, False)], axis=0
    )
    assert counts == pytest.approx([0.45, 0.75, 1.8], abs=0.01)


def test_certain_particles_have_finite_weights_and_chance_follows_the_seed() -> None:
    level = level_of([1.0, 0.0, 1.0], 4)
    assert Particles().select(level, SearchConfig(width=4)).allocation.tolist() == [2, 0, 2]
    drawn = {
        tuple(Particles().select(level_of([0.5] * 4, 2, seed=seed), SearchConfig(width=2)).allocation.tolist())
        for seed in range(20)
    }
    assert len(drawn) > 1
    again = [
        Particles().select(level_of([0.5] * 4, 2, seed=7), SearchConfig(width=2)).allocation.tolist() for _ in "ab"
    ]
    assert again[0] == again[1]
