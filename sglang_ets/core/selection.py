"""Which leaves of a complete level go on, and how many children each gets. Pure and thread-safe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.allocation import even_allocation, inherited_scores, rebase_allocation
from sglang_ets.core.clusters import Distances, cluster_labels, cosine_distances
from sglang_ets.core.config import Algorithm, KvCost, SearchConfig
from sglang_ets.core.ilp import BudgetTooSmall, CostTree, SolverFailure, SolverReport, solve


@dataclass(frozen=True)
class Level:
    """A complete level as selection sees it: L unfinished leaves in order of creation."""

    scores: NDArray[np.float64]  # float64[L], step scores
    kv: CostTree | None  # tokens of KV, from the radix ledger; None: no integer program asks for them
    nodes: CostTree | None  # the search tree itself, cost 1 a node; None: likewise
    embeddings: NDArray[np.float32] | None  # float32[L, H]; None: no coverage
    subtree: NDArray[np.int64]  # int64[L], DVTS group
    growth_tokens: float  # tokens that the next level may add if every child is as long as these steps
    remaining_width: int

    def costs(self, unit: KvCost) -> CostTree:
        """What the leaves cost in this unit.

        Raises:
            ValueError: the level was made without them.
        """
        tree = self.kv if unit == "tokens" else self.nodes
        if tree is None:
            raise ValueError(f"a level of an integer program needs its costs in {unit}, got none")
        return tree


@dataclass(frozen=True)
class Selection:
    """The decision. All zeros: nothing fits into the KV budget, the search ends with what it has."""

    allocation: NDArray[np.int64]  # int64[L], children per leaf; 0: pruned
    clusters: NDArray[np.int64] | None = None  # int64[L]
    solver: SolverReport | None = None
    is_fallback: bool = False  # the solver failed and REBASE decided


class SelectionPolicy(Protocol):
    """Decides the retained leaves of a level and their allocation."""

    def select(self, level: Level, config: SearchConfig) -> Selection:
        """The allocation sums to the remaining width, or is all zeros."""
        ...


class BestOfN:
    """Every trajectory goes on alone. (The search expands them without waiting for a level.)"""

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        everything = np.arange(level.scores.size)
        return Selection(even_allocation(level.scores, everything, level.remaining_width))


class Beam:
    """The best ceil(sqrt(width)) leaves share the width evenly. Source: the ETS code's beam search."""

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        kept = np.argsort(-level.scores, kind="stable")[: num_groups(level.remaining_width)]
        return Selection(even_allocation(level.scores, kept, level.remaining_width))


class Dvts:
    """The best leaf of each subtree of the first level; the width is shared evenly. Source: search-and-learn."""

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        best: dict[int, int] = {}
        for place in np.argsort(-level.scores, kind="stable").tolist():
            best.setdefault(int(level.subtree[place]), place)
        kept = np.array(sorted(best.values()), dtype=np.int64)
        return Selection(even_allocation(level.scores, kept, level.remaining_width))


class Rebase:
    """Every leaf gets a share of the width in proportion to softmax(score / T). Source: arXiv 2408.00724."""

    def select(self, level: Level, config: SearchConfig) -> Selection:
        return Selection(rebase_allocation(level.scores, level.remaining_width, config.rebase_temperature))


@dataclass(frozen=True)
class Ets:
    """The integer program chooses the leaves, REBASE shares the width over them. Source: arXiv 2502.13575.

    With `coverage="reward"` (ours), a cluster is worth the reward of its leaves: keeping one of them earns what all that mean
    the same were worth, and the kept leaves of a cluster inherit the width of those that are not kept.
    """

    with_coverage: bool
    distances: Distances = cosine_distances

    def select(self, level: Level, config: SearchConfig) -> Selection:
        shares = rebase_allocation(level.scores, level.remaining_width, config.rebase_temperature)
        clusters = worth = None
        if self.with_coverage and level.embeddings is not None and config.weights.diversity_weight > 0:
            clusters = cluster_labels(level.embeddings, config.cluster_distance, self.distances)
            if config.coverage == "reward":
                worth = np.bincount(clusters, weights=shares / level.remaining_width).astype(np.float64)
        budget = None
        if config.kv_budget_tokens is not None:
            budget = config.kv_budget_tokens - level.growth_tokens
        try:
            kept, report = solve(
                shares / level.remaining_width,
                level.costs(config.kv_cost),
                config.weights.kv_cost_weight,
                clusters,
                config.weights.diversity_weight,
                budget,
                worth,
            )
        except BudgetTooSmall:
            return Selection(np.zeros_like(shares), clusters)
        except SolverFailure:
            return Selection(shares, clusters, is_fallback=True)
        places = np.flatnonzero(kept)
        scores = level.scores[places]
        if clusters is not None and worth is not None:
            scores = inherited_scores(level.scores, clusters, kept, config.rebase_temperature)[places]
        allocation = np.zeros_like(shares)
        allocation[places] = rebase_allocation(scores, level.remaining_width, config.rebase_temperature)
        return Selection(allocation, clusters, report)


def make_policies(distances: Distances = cosine_distances) -> dict[Algorithm, SelectionPolicy]:
    """All policies; ETS clusters by `distances`."""
    return {
        "best_of_n": BestOfN(),
        "beam": Beam(),
        "dvts": Dvts(),
        "rebase": Rebase(),
        "ets_kv": Ets(with_coverage=False),
        "ets": Ets(with_coverage=True, distances=distances),
    }


POLICIES = make_policies()


def get_policy(name: Algorithm) -> SelectionPolicy:
    """The policy of an algorithm; names are checked by `SearchConfig`."""
    return POLICIES[name]


def num_groups(width: int) -> int:
    """Beams, or subtrees, that share a width: ceil(sqrt(width))."""
    return math.isqrt(width - 1) + 1 if width > 0 else 0
