"""Which leaves of a complete level go on, and how many children each gets. Pure and thread-safe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.allocation import even_allocation, inherited_scores, rebase_allocation
from sglang_ets.core.clusters import Distances, cluster_labels, cosine_distances
from sglang_ets.core.config import KvCost, SearchConfig
from sglang_ets.core.ilp import BudgetTooSmall, CostTree, SolverFailure, SolverReport, solve
from sglang_ets.core.settings import shown


@dataclass(frozen=True)
class Level:
    """A complete level as selection sees it: L unfinished leaves in order of creation. Field by field: docs/policies.md.

    If the policy reads pruned leaves, those that may come back stand after them.
    """

    scores: NDArray[np.float64]  # float64[L], step scores, 0..1
    kv: CostTree | None  # distinct tokens under the leaves, see `kv_costs`; None: the policy does not read costs
    nodes: CostTree | None  # the search tree itself, cost 1 a node; None: likewise, or costs are in tokens
    embeddings: NDArray[np.float32] | None  # float32[L, H] of the last steps; None: not read, or the PRM gave none
    subtree: NDArray[np.int64]  # int64[L], DVTS group
    growth_tokens: float  # tokens that the next level may add if every child is as long as these steps
    remaining_width: int  # trajectories still to be grown: what the allocation sums to
    depth: int = 1  # steps of each leaf's trajectory; of the longest one where there are pruned leaves
    seed: int = 0  # of the search
    texts: tuple[str, ...] = ()  # of the last steps
    path_scores: tuple[tuple[float, ...], ...] = ()  # step scores of each leaf's trajectory, the last one included
    parents: NDArray[np.int64] | None = None  # int64[L], equal for siblings
    distances: Distances = cosine_distances  # of embeddings, on the device where there is one
    number: int | None = None  # of the level, from 1; None: its depth
    is_pruned: NDArray[np.bool_] | None = None  # bool[L]; None: not read, so no leaf is

    @property
    def depths(self) -> NDArray[np.int64]:
        """int64[L], steps of each leaf's trajectory."""
        return np.array([len(scores) for scores in self.path_scores], dtype=np.int64)

    def rng(self) -> np.random.Generator:
        """Chance that is the same for this level of every search with this seed."""
        return np.random.default_rng((self.seed, self.depth if self.number is None else self.number))

    def clusters(self, cut: float) -> NDArray[np.int64]:
        """int64[L], 0..K-1: leaves whose last steps mean the same, by average linkage cut at this cosine distance.

        Raises:
            ValueError: the level has no embeddings.
        """
        if self.embeddings is None:
            raise ValueError(
                'clusters need embeddings, and this level has none; set reads = ("embeddings",) in the policy'
            )
        return cluster_labels(self.embeddings, cut, self.distances)

    def costs(self, unit: KvCost) -> CostTree:
        """What the leaves cost in this unit.

        Raises:
            ValueError: the level was made without them.
        """
        tree = self.kv if unit == "tokens" else self.nodes
        if tree is None:
            raise ValueError(f'this level needs its costs in {unit}, got none; set reads = ("costs",) in the policy')
        return tree


@dataclass(frozen=True)
class Selection:
    """The decision. All zeros: nothing fits into the KV budget, the search ends with what it has."""

    allocation: NDArray[np.int64]  # int64[L], children per leaf; 0: pruned
    clusters: NDArray[np.int64] | None = None  # int64[L]
    solver: SolverReport | None = None
    is_fallback: bool = False  # the solver failed and REBASE decided


class SelectionPolicy(Protocol):
    """Decides the retained leaves of a level and their allocation. Pure: equal levels give equal selections.

    A class may also have `reads`, which of `registry.READS` its levels are to hold; `is_cheap`, that it may run on the
    scheduler's loop; `name`; and, as a dataclass, fields made with `setting`, which a request can set.
    """

    def select(self, level: Level, config: SearchConfig) -> Selection:
        """The allocation sums to the remaining width, or is all zeros."""
        ...


def checked(selection: Selection, level: Level, algorithm: str) -> Selection:
    """The same selection.

    Raises:
        ValueError: it does not share out the remaining width; both sides are named.
    """
    allocation = np.asarray(selection.allocation)
    wanted = (level.scores.shape, level.remaining_width)
    is_whole = np.issubdtype(allocation.dtype, np.integer) and (allocation >= 0).all()
    got = (allocation.shape, int(allocation.sum()) if is_whole else allocation.tolist())
    if got not in (wanted, (wanted[0], 0)):
        raise ValueError(
            f"the policy {algorithm} must give {wanted[0][0]} leaves whole numbers of children that sum to {wanted[1]}, or no "
            f"leaf any, got shape {got[0]} and {shown(got[1])}"
        )
    return selection


class BestOfN:
    """Every trajectory goes on alone. (The search expands them without waiting for a level.)"""

    is_cheap = True

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        everything = np.arange(level.scores.size)
        return Selection(even_allocation(level.scores, everything, level.remaining_width))


class Beam:
    """The best ceil(sqrt(width)) leaves share the width evenly. Source: the ETS code's beam search."""

    is_cheap = True

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        kept = np.argsort(-level.scores, kind="stable")[: num_groups(level.remaining_width)]
        return Selection(even_allocation(level.scores, kept, level.remaining_width))


class Dvts:
    """The best leaf of each subtree of the first level; the width is shared evenly. Source: search-and-learn."""

    is_cheap = True

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        best: dict[int, int] = {}
        for place in np.argsort(-level.scores, kind="stable").tolist():
            best.setdefault(int(level.subtree[place]), place)
        kept = np.array(sorted(best.values()), dtype=np.int64)
        return Selection(even_allocation(level.scores, kept, level.remaining_width))


class Rebase:
    """Every leaf gets a share of the width in proportion to softmax(score / T). Source: arXiv 2408.00724."""

    is_cheap = True

    def select(self, level: Level, config: SearchConfig) -> Selection:
        return Selection(rebase_allocation(level.scores, level.remaining_width, config.rebase_temperature))


@dataclass(frozen=True)
class Ets:
    """The integer program chooses the leaves, REBASE shares the width over them. Source: arXiv 2502.13575.

    With `coverage="reward"` (ours), a cluster is worth the reward of its leaves: keeping one of them earns what all that mean
    the same were worth, and the kept leaves of a cluster inherit the width of those that are not kept.
    """

    reads: ClassVar[tuple[str, ...]] = ("costs", "embeddings")
    covers: ClassVar[bool] = True

    def select(self, level: Level, config: SearchConfig) -> Selection:
        shares = rebase_allocation(level.scores, level.remaining_width, config.rebase_temperature)
        clusters = worth = None
        if self.covers and level.embeddings is not None and config.weights.diversity_weight > 0:
            clusters = level.clusters(config.cluster_distance)
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


@dataclass(frozen=True)
class EtsKv(Ets):
    """ETS without the coverage term."""

    reads: ClassVar[tuple[str, ...]] = ("costs",)
    covers: ClassVar[bool] = False


def num_groups(width: int) -> int:
    """Beams, or subtrees, that share a width: ceil(sqrt(width))."""
    return math.isqrt(width - 1) + 1 if width > 0 else 0
