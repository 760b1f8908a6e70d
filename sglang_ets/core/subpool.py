"""Subpool selection: what was pruned competes again, each time with another part of all leaves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_ets.core.allocation import even_allocation
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.selection import Level, Selection, num_groups
from sglang_ets.core.settings import setting


@dataclass(frozen=True)
class Subpool:
    """All leaves, pruned ones too, are dealt at random into subpools; the best leaf of each goes on.

    A pruned leaf so passes by over-scored ones that chance has put elsewhere. The leaves that go on share the width evenly.
    How many subpools there are (by default as many as `beam` keeps leaves), how the width is shared, and that a leaf leaves
    the pool when it goes on, is ours.

    Source: arXiv 2605.25143, as its abstract has the rule.
    """

    reads = ("pruned",)
    is_cheap = True

    subpools: int | None = setting(
        None,
        "random subpools, the best leaf of each of which goes on",
        low=1,
        high=1024,
        default_text="ceil(sqrt(remaining width))",
    )
    pruned_per_width: int = setting(
        4, "pruned leaves that may come back, the best by score, in multiples of the width", low=0, high=64
    )

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        width, num_leaves = level.remaining_width, level.scores.size
        count = min(self.subpools or num_groups(width), width, num_leaves)
        dealt = np.array_split(level.rng().permutation(num_leaves), count)
        best = sorted(int(pool[np.argmax(level.scores[pool])]) for pool in dealt)
        return Selection(even_allocation(level.scores, np.array(best, dtype=np.int64), width))
