"""The integer program of one level: which leaves are worth the KV that keeping them holds. The only file that speaks to HiGHS.

    maximise   sum_i reward_i x_i  -  kv_weight * sum_j cost_j y_j / sum_j cost_j  +  diversity_weight * sum_k worth_k z_k
    subject to x_i <= y_leaf(i)              a kept leaf keeps the last cost node of its path
               y_j <= y_parent(j)            a kept cost node keeps its parent
               z_k <= sum_{i in cluster k} x_i
               sum_i x_i >= 1
               sum_j cost_j y_j <= budget    if there is one
               x binary, 0 <= y <= 1, 0 <= z <= 1

A leaf whose last cost node is kept is kept too, because that is free: x_i = y_leaf(i), and HiGHS gets no x but binary y. z
needs no integrality: at an optimum z_k is the smaller of 1 and its row. Source: ETS, arXiv 2502.13575, with costs in tokens.
There every cluster is worth the same, worth_k = 1 / K.

With these rows alone the relaxation takes halves: two leaves of cluster k below one dear node, each kept by a half, cover k
whole and pay for half of the node. So branches of a cluster that meet in node j count for what j is kept at most:

    f_jk <= y_j,  f_jk <= sum of the branches of k below j,  z_k <= sum of the topmost branches of k

with a joint f_jk where they meet; a branch is a joint, or a node that covers k itself. With binary y nothing changes.

Three ways lead to the optimum, the cheapest first: `reduction.reduce_level` decides all there is; HiGHS solves the linear
relaxation of the core, and it is whole (most often, thanks to the joints); HiGHS solves the core as an integer program. A level
whose best set is empty or breaks the budget is solved as it stands, with all rows.

Ties: of equal sets the larger one, where adding a leaf is free; of sibling leaves that are worth the same and cover the same
cluster, the first; any other tie falls as HiGHS's fixed path has it (one thread, fixed seed).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import highspy
import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.reduction import NOWHERE, Core, reduce_level

TIME_LIMIT_S = 2.0
NOTHING_FITS = "no leaf fits into the KV budget"
KEPT = 0.5  # a binary above this is one
INTEGRAL = 1e-7  # how far from 0 or 1 a value of the relaxation may be to count as whole
SCALE = 1e4  # of the objective, so that HiGHS's absolute tolerances of 1e-7 are small against differences that matter
Path = Literal["reduced", "relaxation", "integer", "full"]


@dataclass(frozen=True)
class CostTree:
    """A forest of costs in topological order: a node's parent comes before it. Several leaves may end in one node."""

    parent: NDArray[np.int64]  # int64[M], -1 at a root
    cost: NDArray[np.float64]  # float64[M], not negative
    leaf: NDArray[np.int64]  # int64[L], the node where each leaf's path ends; -1: the path costs nothing

    @classmethod
    def from_paths(cls, paths: Iterable[Iterable[tuple[Any, float]]], *, by_key: bool = False) -> CostTree:
        """The union of the leaves' paths, each a (key, cost) per node from its root down; an empty path costs nothing.

        Equal keys after equal paths are one node, which costs what it cost at its first occurrence. Nodes are numbered in order
        of first occurrence, or of their keys if `by_key` (then numbers, a parent's the smaller): the solver's last tie rule
        goes by number.
        """
        parent: list[int] = []
        cost: list[float] = []
        ends: list[int] = []
        index: dict[tuple[int, Any], int] = {}
        for path in paths:
            at = -1
            for key, price in path:
                place = (at, key)
                if place not in index:
                    index[place] = len(parent)
                    parent.append(at)
                    cost.append(price)
                at = index[place]
            ends.append(at)
        tree = cls(np.array(parent, dtype=np.int64), np.array(cost, dtype=np.float64), np.array(ends, dtype=np.int64))
        return tree._in_order(np.argsort([key for _, key in index])) if by_key and index else tree

    def _in_order(self, order: NDArray[np.int64]) -> CostTree:  # int64[M]
        """The same forest with `order[i]` as its node i."""
        rank = np.full(order.size + 1, -1, dtype=np.int64)  # the last one stands for -1, which stays what it is
        rank[order] = np.arange(order.size)
        return CostTree(rank[self.parent[order]], self.cost[order], rank[self.leaf])

    def held(self, kept: NDArray[np.bool_ | np.integer]) -> NDArray[np.bool_]:  # bool[L] or places -> bool[M]
        """The nodes on the paths of the kept leaves: what keeping them costs is `cost[held].sum()`."""
        held = np.zeros(self.parent.size, dtype=np.bool_)
        for end in self.leaf[kept].tolist():
            node = end
            while node >= 0 and not held[node]:
                held[node] = True
                node = int(self.parent[node])
        return held

    def share_held(self, kept: NDArray[np.bool_ | np.integer]) -> float:  # bool[L] or places
        """Share of all cost that keeping these leaves holds, 0..1."""
        return float(self.cost[self.held(kept)].sum() / self.cost.sum())


@dataclass(frozen=True)
class SolverReport:
    """How one solve went."""

    status: str  # "optimal", or "time_limit" with the incumbent
    path: Path  # which way led to the optimum
    objective: float
    gap: float  # relative, 0 when optimal
    rows: int  # of the level as it stands
    columns: int
    core_rows: int  # after our reductions, as HiGHS got it
    core_columns: int
    build_ms: float
    solve_ms: float


class SolverFailure(RuntimeError):
    """HiGHS has no solution; the level is selected by REBASE instead."""


class BudgetTooSmall(RuntimeError):
    """Not even one leaf fits into the KV budget."""


@dataclass(frozen=True)
class _Rows:
    """Constraint rows in compressed form."""

    columns: list[NDArray[np.int64]]
    values: list[NDArray[np.float64]]
    lower: list[NDArray[np.float64]]
    upper: list[NDArray[np.float64]]
    lengths: list[NDArray[np.int64]]

    @classmethod
    def none(cls) -> _Rows:
        return cls([], [], [], [], [])

    @property
    def size(self) -> int:
        return sum(lengths.size for lengths in self.lengths)

    def add_pairs(self, small: NDArray[np.int64], large: NDArray[np.int64]) -> None:
        """Rows `small - large <= 0`."""
        self.columns.append(np.column_stack([small, large]).ravel())
        self.values.append(np.tile([1.0, -1.0], small.size))
        self._bounds(np.full(small.size, -np.inf), np.zeros(small.size), np.full(small.size, 2, dtype=np.int64))

    def add_cover(self, cluster: int, members: NDArray[np.int64]) -> None:
        """Row `cluster - sum of members <= 0`."""
        columns = np.concatenate([[cluster], members])
        self.add(columns, np.concatenate([[1.0], -np.ones(members.size)]), -np.inf, 0.0)

    def add(self, columns: NDArray[np.int64], values: NDArray[np.float64], lower: float, upper: float) -> None:
        """One row."""
        self.columns.append(columns)
        self.values.append(values)
        self._bounds(np.array([lower]), np.array([upper]), np.array([columns.size], dtype=np.int64))

    def _bounds(self, lower: NDArray[np.float64], upper: NDArray[np.float64], lengths: NDArray[np.int64]) -> None:
        self.lower.append(lower)
        self.upper.append(upper)
        self.lengths.append(lengths)


@dataclass(frozen=True)
class _Answer:
    """The result of one run of HiGHS."""

    values: NDArray[np.float64]
    status: str
    gap: float


def solve(
    reward: NDArray[np.float64],  # float64[L], not negative
    tree: CostTree,
    kv_weight: float,
    clusters: NDArray[np.int64] | None,  # int64[L], labels 0..K-1
    diversity_weight: float,
    budget: float | None = None,
    worth: NDArray[np.float64] | None = None,  # float64[K], not negative, sums to 1; None: 1 / K each
) -> tuple[NDArray[np.bool_], SolverReport]:  # bool[L]
    """The leaves to keep. Deterministic: equal input gives equal output.

    Raises:
        BudgetTooSmall: no leaf fits into `budget`.
        SolverFailure: HiGHS ended without a solution.
    """
    started = time.perf_counter()
    labels = clusters if diversity_weight > 0 else None
    bonus = _bonus(labels, diversity_weight, worth)
    core = _reduced(reward, tree, kv_weight, labels, bonus)
    built = time.perf_counter()
    values, path, answer, size = _solve_core(core, bonus, _Rows.none())
    held = _held(core, values, tree)
    if not held[tree.leaf].any() or (budget is not None and float(tree.cost[held[:-1]].sum()) > budget):
        core, path = _unreduced(reward, tree, kv_weight, labels), "full"
        values, _, answer, size = _solve_core(core, bonus, _limits(tree, budget))
        held = _held(core, values, tree)
    kept = held[tree.leaf]
    num_clusters = bonus.size
    num_groups = np.unique(tree.leaf).size
    report = SolverReport(
        status=answer.status,
        path=path,
        objective=_value(kept, held[:-1], reward, tree, kv_weight, labels, bonus),
        gap=answer.gap,
        rows=num_groups + int((tree.parent >= 0).sum()) + num_clusters + 1,
        columns=num_groups + tree.parent.size + num_clusters,
        core_rows=size[0],
        core_columns=size[1],
        build_ms=(built - started) * 1e3,
        solve_ms=(time.perf_counter() - built) * 1e3,
    )
    return kept, report


def _value(
    kept: NDArray[np.bool_],
    held: NDArray[np.bool_],  # bool[M], the cost nodes that are kept
    reward: NDArray[np.float64],
    tree: CostTree,
    kv_weight: float,
    clusters: NDArray[np.int64] | None,
    bonus: NDArray[np.float64],  # float64[K]
) -> float:
    """`objective` of what the solver decided: its own cost nodes, and the worth of clusters in one array."""
    total = float(tree.cost.sum())
    cost = float(tree.cost[held].sum()) / total if total > 0 else 0.0
    covered = float(bonus[np.unique(clusters[kept])].sum()) if clusters is not None else 0.0
    return float(reward[kept].sum()) - kv_weight * cost + covered


def _bonus(
    clusters: NDArray[np.int64] | None, diversity_weight: float, worth: NDArray[np.float64] | None
) -> NDArray[np.float64]:  # float64[K]
    """What covering each cluster adds to the objective."""
    if clusters is None:
        return np.zeros(0)
    num_clusters = int(clusters.max()) + 1
    return np.full(num_clusters, diversity_weight / num_clusters) if worth is None else diversity_weight * worth


def _forest(
    reward: NDArray[np.float64], tree: CostTree, kv_weight: float, clusters: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], dict[int, set[int]], set[int]]:
    """What each cost node yields, float64[M]; the clusters that nodes cover, and those of leaves whose path costs nothing."""
    num_nodes = tree.parent.size
    total = float(tree.cost.sum())
    gain = np.bincount(tree.leaf + 1, weights=reward, minlength=num_nodes + 1)[1:]
    weight: NDArray[np.float64] = gain - kv_weight * tree.cost / total if total > 0 else gain.astype(np.float64)
    covers: dict[int, set[int]] = {}
    if clusters is not None:
        for node, cluster in zip(tree.leaf.tolist(), clusters.tolist(), strict=True):
            covers.setdefault(node, set()).add(cluster)
    return weight, covers, covers.pop(-1, set())


def _reduced(
    reward: NDArray[np.float64],
    tree: CostTree,
    kv_weight: float,
    clusters: NDArray[np.int64] | None,
    bonus: NDArray[np.float64],  # float64[K]
) -> Core:
    weight, covers, free = _forest(reward, tree, kv_weight, clusters)
    return reduce_level(weight.tolist(), tree.parent.tolist(), covers, free, bonus.tolist())


def _unreduced(
    reward: NDArray[np.float64], tree: CostTree, kv_weight: float, clusters: NDArray[np.int64] | None
) -> Core:
    """The level as it stands."""
    weight, covers, free = _forest(reward, tree, kv_weight, clusters)
    nodes = range(tree.parent.size)
    return Core([], tree.parent, weight, [[node] for node in nodes], [covers.get(node, set()) - free for node in nodes])


def _limits(tree: CostTree, budget: float | None) -> _Rows:
    """The rows that the reductions do not know: at least one leaf, and the budget.

    Raises:
        BudgetTooSmall: there is no budget left at all.
    """
    if budget is not None and budget < 0:
        raise BudgetTooSmall(NOTHING_FITS)
    rows = _Rows.none()
    ends = np.unique(tree.leaf)
    if ends[0] >= 0:  # else a leaf costs nothing, and is kept
        rows.add(ends, np.ones(ends.size), 1.0, np.inf)
    if budget is not None:
        rows.add(np.arange(tree.parent.size), tree.cost.copy(), -np.inf, budget)
    return rows


def _held(core: Core, values: NDArray[np.float64], tree: CostTree) -> NDArray[np.bool_]:
    """bool[M + 1]: the cost nodes that are kept; the last one stands for the leaves whose path costs nothing."""
    held = np.zeros(tree.parent.size + 1, dtype=np.bool_)
    held[-1] = True
    held[core.kept] = True
    for members, value in zip(core.members, values.tolist(), strict=True):
        if value > KEPT:
            held[members] = True
    return held


def _solve_core(
    core: Core,
    bonus: NDArray[np.float64],  # float64[K]
    rows: _Rows,  # over the core's nodes; those of the core are added
) -> tuple[NDArray[np.float64], Path, _Answer, tuple[int, int]]:
    """Values of the core's nodes, the way that led to them, and the rows and columns that HiGHS got."""
    if not core.members:
        return np.zeros(0), "reduced", _Answer(np.zeros(0), "optimal", 0.0), (0, 0)
    num_nodes = core.parent.size
    inner = np.flatnonzero(core.parent >= 0)
    rows.add_pairs(inner, core.parent[inner])
    gain = np.concatenate([core.weight, _add_covers(rows, core, bonus)])
    answer = _run(_lp(gain, 0, rows))
    nodes = answer.values[:num_nodes]
    path: Path = "relaxation"
    if np.abs(nodes - np.round(nodes)).max() > INTEGRAL:
        path = "integer"
        answer = _run(_lp(gain, num_nodes, rows))
    return answer.values[:num_nodes], path, answer, (rows.size, gain.size)


def _add_covers(rows: _Rows, core: Core, bonus: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows of the clusters. Returns the gain of the columns that they add: joints, and each cluster after its own."""
    parent = core.parent.tolist()
    nodes_of: dict[int, list[int]] = {}
    for node, covers in enumerate(core.covers):
        for cluster in covers:
            nodes_of.setdefault(cluster, []).append(node)
    gain: list[float] = []
    for cluster, nodes in sorted(nodes_of.items()):
        joints, branches = _joints(nodes, parent, len(parent) + len(gain))
        for joint, (node, below) in joints.items():
            rows.add_pairs(np.array([joint]), np.array([node]))
            rows.add_cover(joint, np.array(below))
        gain += [0.0] * len(joints)
        rows.add_cover(len(parent) + len(gain), np.array(branches))
        gain.append(float(bonus[cluster]))
    return np.array(gain)


def _joints(
    nodes: list[int], parent: list[int], first_column: int
) -> tuple[dict[int, tuple[int, list[int]]], list[int]]:
    """The joints of the cluster that these nodes cover, each with its node and the columns below; and the topmost columns."""
    joints: dict[int, tuple[int, list[int]]] = {}
    below: dict[int, list[int]] = {node: [node] for node in nodes}
    above = set(nodes)
    for node in nodes:
        while (node := parent[node]) not in above and node != NOWHERE:
            above.add(node)
    for node in sorted(above, reverse=True):
        columns = below[node]
        if node in columns:
            columns = [node]  # it covers the cluster itself, and nothing below it is kept without it
        elif len(columns) > 1:
            joint = first_column + len(joints)
            joints[joint] = (node, columns)
            columns = [joint]
        below.setdefault(parent[node], []).extend(columns)
    return joints, below[NOWHERE]


def _run(lp: highspy.HighsLp) -> _Answer:
    """Solve with HiGHS and check how it ended."""
    solver = _solver()
    solver.passModel(lp)
    solver.run()
    status = solver.getModelStatus()
    info = solver.getInfo()
    is_feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if status == highspy.HighsModelStatus.kInfeasible:
        raise BudgetTooSmall(NOTHING_FITS)
    if not is_feasible or status not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit):
        raise SolverFailure(f"HiGHS ended with {solver.modelStatusToString(status)}")
    values = np.asarray(solver.getSolution().col_value)
    is_optimal = status == highspy.HighsModelStatus.kOptimal
    return _Answer(values, "optimal" if is_optimal else "time_limit", 0.0 if is_optimal else float(info.mip_gap))


def objective(
    kept: NDArray[np.bool_],  # bool[L]
    reward: NDArray[np.float64],
    tree: CostTree,
    kv_weight: float,
    clusters: NDArray[np.int64] | None,
    diversity_weight: float,
    worth: NDArray[np.float64] | None = None,  # float64[K]
) -> float:
    """Value of a set of leaves, straight from the definition. The oracle of the tests."""
    total = float(tree.cost.sum())
    cost = float(tree.cost[tree.held(kept)].sum()) / total if total > 0 else 0.0
    covered = 0.0
    if clusters is not None:
        num_clusters = len(set(clusters.tolist()))
        covered = sum(1 / num_clusters if worth is None else float(worth[k]) for k in set(clusters[kept].tolist()))
    return float(reward[kept].sum()) - kv_weight * cost + diversity_weight * covered


def _lp(gain: NDArray[np.float64], num_integer: int, rows: _Rows) -> highspy.HighsLp:
    """A HiGHS model with all columns in 0..1, the first `num_integer` of them integer."""
    lp = highspy.HighsLp()
    lengths = np.concatenate(rows.lengths) if rows.lengths else np.zeros(0, dtype=np.int64)
    lp.num_col_, lp.num_row_ = gain.size, lengths.size
    lp.col_cost_ = gain * SCALE
    lp.col_lower_, lp.col_upper_ = np.zeros(gain.size), np.ones(gain.size)
    lp.row_lower_, lp.row_upper_ = np.concatenate(rows.lower), np.concatenate(rows.upper)
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate(rows.columns).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate(rows.values)
    if num_integer:
        kinds = [highspy.HighsVarType.kInteger] * num_integer
        lp.integrality_ = kinds + [highspy.HighsVarType.kContinuous] * (gain.size - num_integer)
    return lp


def _solver() -> highspy.Highs:
    """A new HiGHS, because a used one counts its time limit from its first solve for a linear program, and anew for an integer
    one; it costs 0.1 ms. `run` releases the interpreter lock."""
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.silent()
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("random_seed", 0)
    # Keeping nothing is feasible in a core, and this heuristic looks for more than that for up to 15 ms.
    solver.setOptionValue("mip_heuristic_run_feasibility_jump", False)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.setOptionValue("mip_abs_gap", 1e-10 * SCALE)
    solver.setOptionValue("time_limit", TIME_LIMIT_S)
    return solver
