"""Particle filtering: leaves are resampled by what the PRM makes of their last step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.selection import Level, Selection
from sglang_ets.core.settings import setting

LEAST_DOUBT = 1e-7  # of a score, from 0 and from 1: a particle that is sure has finite odds


@dataclass(frozen=True)
class Particles:
    """As many particles as trajectories remain are drawn from the leaves by systematic resampling.

    A leaf's weight is the softmax of the log-odds of its score, which at temperature 1 is in proportion to score / (1 - score).
    Complete trajectories keep the one place that they have; in the paper they stay among the particles that are drawn from.

    Source: arXiv 2502.01618.
    """

    temperature: float = setting(
        1.0, "temperature of the softmax over log-odds of scores", low=1e-3, high=1e3, has_flag=True
    )

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        scores = np.clip(level.scores, LEAST_DOUBT, 1.0 - LEAST_DOUBT)
        logits = np.log(scores / (1.0 - scores)) / self.temperature
        weights = np.exp(logits - logits.max())
        start = float(level.rng().random())
        return Selection(systematic(weights / weights.sum(), level.remaining_width, start))


def systematic(
    weights: NDArray[np.float64],  # float64[L], sum 1
    count: int,
    start: float,  # 0..1, where in its stretch each draw falls
) -> NDArray[np.int64]:  # int64[L], sums to count
    """How often each of the stretches that the weights cut 0..1 into is hit by `count` points at equal distances."""
    edges = np.cumsum(weights)
    edges[-1] = 1.0
    points = (start + np.arange(count)) / count
    return np.bincount(np.searchsorted(edges, points, side="right"), minlength=weights.size).astype(np.int64)
