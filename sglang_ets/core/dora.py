"""DORA: width by direction, so that a direction is not favoured for being taken often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_ets.core.allocation import rebase_allocation
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.selection import Level, Selection


@dataclass(frozen=True)
class Dora:
    """Every leaf's REBASE weight is divided by the number of leaves that mean the same, then the width is shared by weight.

    A direction's share is then in proportion to the mean weight of its leaves, not to their sum. Directions are the clusters
    of the leaves' last steps; the paper's affinity, a softmax over cosine similarity, becomes membership of a cluster, and its
    rounding that of REBASE, which shares out exactly the remaining width.

    Source: arXiv 2506.15707.
    """

    reads = ("embeddings",)

    def select(self, level: Level, config: SearchConfig) -> Selection:
        if level.embeddings is None:
            return Selection(rebase_allocation(level.scores, level.remaining_width, config.rebase_temperature))
        clusters = level.clusters(config.cluster_distance)
        sizes = np.bincount(clusters)[clusters]
        scores = level.scores - config.rebase_temperature * np.log(sizes)  # weight / size, as a score
        return Selection(rebase_allocation(scores, level.remaining_width, config.rebase_temperature), clusters)
