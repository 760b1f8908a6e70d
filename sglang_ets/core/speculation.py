"""Which children may begin before their level is complete: those that selection would want of what is known so far. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.allocation import by_score
from sglang_ets.core.tree import Node

# So much of a level must have its scores: earlier, what is best so far is too often not the best of all. Where leaves that
# mean the same compete for one place, every one that comes may take it.
KNOWN_SHARE, KNOWN_SHARE_OF_CLUSTERS = 0.5, 0.75
SCORED_PARTS = 4  # a level is scored in so many parts at most, its last steps aside: each part is a pass of the PRM

Forecast = tuple[tuple[int, int], ...]  # leaf and number of its children, the best score first


@dataclass(frozen=True)
class Guess:
    """Children of a scored leaf that may begin now. They get the places from `first` on among its children."""

    leaf_id: int
    first: int
    count: int
    max_new_tokens: int


def known_width(width: int, num_known: int, num_leaves: int) -> int:
    """Of a width that all leaves of a level share, what those will get together that have their scores."""
    return max(1, round(width * num_known / num_leaves))


def forecast(leaves: Sequence[Node], allocation: NDArray[np.int64]) -> Forecast:
    """What selection gave to these leaves, without those that got nothing."""
    scores = np.array([leaf.score for leaf in leaves], dtype=np.float64)
    return tuple((leaves[place].id, int(allocation[place])) for place in by_score(scores) if allocation[place])
