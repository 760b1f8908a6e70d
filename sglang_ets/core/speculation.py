"""Which children may begin before their level is complete: those that selection will most probably want. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_ets.core.allocation import by_score


@dataclass(frozen=True)
class Guess:
    """Children of a scored leaf that may begin now. They get the places from `first` on among its children."""

    leaf_id: int
    first: int
    count: int
    max_new_tokens: int


def best_first(scores: Sequence[float | None], width: int, temperature: float) -> list[tuple[int, int]]:
    """Leaf and number of children that it probably gets, of the leaves that probably get any; the best score first.

    A leaf's share of the width is that of REBASE, whatever the policy; it is rounded, where REBASE rounds good leaves up. What
    has no score yet (None) takes part as if it had the mean of those that have, and is not returned.
    """
    known = [score for score in scores if score is not None]
    if not known:
        return []
    mean = sum(known) / len(known)
    filled = np.array([mean if score is None else score for score in scores], dtype=np.float64)
    weights = np.exp((filled - filled.max()) / temperature)
    counts = np.floor(width * weights / weights.sum() + 0.5).astype(int).tolist()
    return [
        (place, counts[place]) for place in by_score(filled).tolist() if scores[place] is not None and counts[place]
    ]
