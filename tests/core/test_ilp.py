"""The integer program against brute force over all subsets, and against the published formulation solved by CBC.

What a level costs comes from `CostTree`: its nodes and sums against the paths they stand for.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import highspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bench.levels import grown_level
from bench.published_ilp import solve_published
from sglang_ets.core import ilp
from sglang_ets.core.allocation import rebase_allocation
from sglang_ets.core.ilp import BudgetTooSmall, CostTree, SolverFailure, objective, solve

Problem = tuple[NDArray[np.float64], CostTree, NDArray[np.int64]]


def random_level(draw: np.random.Generator, num_leaves: int, *, unit_costs: bool = False) -> Problem:
    """A level as a search makes it: a random tree, leaves at its last nodes, some of them at the same one."""
    num_inner = int(draw.integers(0, num_leaves + 1))
    parent = [int(draw.integers(-1, node)) for node in range(num_inner)]
    leaf = []
    for _ in range(num_leaves):
        if draw.random() < 0.05:
            leaf.append(-1)  # all of its path is held anyway
            continue
        if leaf and draw.random() < 0.2:
            leaf.append(leaf[int(draw.integers(len(leaf)))])  # a token-identical sibling
            continue
        leaf.append(len(parent))
        parent.append(int(draw.integers(-1, num_inner)) if num_inner else -1)
    cost = np.ones(len(parent)) if unit_costs else draw.integers(0, 40, len(parent)).astype(np.float64)
    scores = draw.random(num_leaves)
    reward = rebase_allocation(scores, num_leaves, 0.2) / num_leaves
    clusters = np.unique(draw.integers(0, max(1, num_leaves // 2), num_leaves), return_inverse=True)[1]
    return reward, CostTree(np.array(parent), cost, np.array(leaf)), clusters.astype(np.int64)


def test_equal_keys_after_equal_paths_are_one_node() -> None:
    paths = [[("a", 3.0), ("b", 1.0)], [("b", 2.0)], [], [("a", 3.0), ("c", 4.0)], [("a", 3.0), ("b", 1.0)]]
    tree = CostTree.from_paths(paths)
    assert tree.parent.tolist() == [-1, 0, -1, 0]
    assert tree.cost.tolist() == [3.0, 1.0, 2.0, 4.0]
    assert tree.leaf.tolist() == [1, 2, -1, 3, 1]
    assert tree.held(np.array([True, False, True, False, False])).tolist() == [True, True, False, False]
    assert tree.held(np.array([3, 1])).tolist() == [True, False, True, True]
    empty = CostTree.from_paths([[], []], by_key=True)
    assert (empty.parent.size, empty.cost.size, empty.leaf.tolist()) == (0, 0, [-1, -1])


def test_nodes_may_be_numbered_by_their_keys() -> None:
    tree = CostTree.from_paths([[(2, 20.0), (5, 50.0)], [(1, 10.0), (4, 40.0)], [], [(2, 20.0)]], by_key=True)
    assert tree.cost.tolist() == [10.0, 20.0, 40.0, 50.0]
    assert tree.parent.tolist() == [-1, -1, 0, 1]
    assert tree.leaf.tolist() == [3, 2, -1, 1]


@given(paths=st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=12), by_key=st.booleans(), data=st.data())
def test_a_cost_tree_is_the_union_of_its_paths(paths: list[list[int]], by_key: bool, data: st.DataObject) -> None:
    nodes = sorted(
        {tuple(path[: depth + 1]) for path in paths for depth in range(len(path))}, key=lambda n: (len(n), n)
    )
    number = {node: place for place, node in enumerate(nodes)}
    prefixes = [[tuple(path[: depth + 1]) for depth in range(len(path))] for path in paths]
    tree = CostTree.from_paths(
        [[(number[node], 1.0 + number[node]) for node in path] for path in prefixes], by_key=by_key
    )
    assert (tree.parent < np.arange(len(nodes))).all(), "a parent comes before its children"
    assert sorted(tree.cost.tolist()) == [1.0 + place for place in range(len(nodes))]
    kept = [place for place in range(len(paths)) if data.draw(st.booleans())]
    held = {node for place in kept for node in prefixes[place]}
    assert tree.cost[tree.held(np.array(kept, dtype=np.int64))].sum() == sum(1.0 + number[node] for node in held)
    if by_key:
        assert tree.cost.tolist() == [1.0 + place for place in range(len(nodes))]


def random_worth(draw: np.random.Generator, clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """What clusters are worth when that differs; some are worth nothing."""
    worth = draw.integers(0, 5, int(clusters.max()) + 1).astype(np.float64)
    return worth / max(1.0, worth.sum())


def best_by_enumeration(
    problem: Problem, kv_weight: float, diversity_weight: float, with_clusters: bool, worth: NDArray[np.float64] | None
) -> float:
    reward, tree, clusters = problem
    subsets = itertools.product([False, True], repeat=reward.size)
    return max(
        objective(np.array(kept), reward, tree, kv_weight, clusters if with_clusters else None, diversity_weight, worth)
        for kept in subsets
        if any(kept)
    )


@pytest.mark.parametrize("seed", range(80))
def test_equals_brute_force(seed: int) -> None:
    draw = np.random.default_rng(seed)
    problem = random_level(draw, int(draw.integers(1, 11)))
    kv_weight, diversity_weight = float(draw.choice([0.0, 0.5, 1.0, 4.0])), float(draw.choice([0.0, 1.0, 1.5]))
    with_clusters = bool(seed % 2)
    reward, tree, clusters = problem
    used = clusters if with_clusters else None
    worth = random_worth(draw, clusters) if with_clusters and seed % 4 == 1 else None
    kept, report = solve(reward, tree, kv_weight, used, diversity_weight, worth=worth)
    assert kept.any()
    assert report.status == "optimal"
    best = best_by_enumeration(problem, kv_weight, diversity_weight, with_clusters, worth)
    assert objective(kept, reward, tree, kv_weight, used, diversity_weight, worth) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(("width", "num_seeds"), [(16, 120), (64, 60), (256, 24)])
def test_equals_cbc_on_the_published_formulation(width: int, num_seeds: int) -> None:
    paths = set()
    for seed in range(num_seeds):
        draw = np.random.default_rng([width, seed])
        problem = random_level(draw, width, unit_costs=bool(seed % 2))
        if seed % 3 == 0:
            case = grown_level(width, 1 + seed % 9, seed)
            problem = (case.reward, case.tree, case.clusters)
        reward, tree, clusters = problem
        weights = float(draw.choice([0.5, 1.0, 2.0, 4.0])), float(draw.choice([0.2, 1.0, 1.45, 3.0]))
        worth = random_worth(draw, clusters) if seed % 5 == 0 else None  # coverage by reward, which is ours
        kept, report = solve(reward, tree, weights[0], clusters, weights[1], worth=worth)
        reference = solve_published(reward, tree, weights[0], clusters, weights[1], worth)
        assert report.status == "optimal"
        values = [objective(one, reward, tree, weights[0], clusters, weights[1], worth) for one in (kept, reference)]
        assert values[0] == pytest.approx(values[1], abs=1e-9)
        paths.add(report.path)
    assert {"relaxation", "integer"} <= paths, "the levels must reach every way to the optimum"


def test_equal_input_gives_equal_output() -> None:
    reward, tree, clusters = random_level(np.random.default_rng(7), 64)
    first, second = (solve(reward, tree, 2.0, clusters, 1.4)[0] for _ in range(2))
    assert first.tolist() == second.tolist()


def test_budget_is_kept_and_can_be_too_small() -> None:
    reward = np.array([0.6, 0.3, 0.1])
    tree = CostTree(np.array([-1, 0, 0, -1]), np.array([10.0, 20.0, 5.0, 4.0]), np.array([1, 2, 3]))
    assert solve(reward, tree, 0.0, None, 0.0)[0].tolist() == [True, True, True]
    assert solve(reward, tree, 0.0, None, 0.0, budget=30)[0].tolist() == [True, False, False]
    assert solve(reward, tree, 0.0, None, 0.0, budget=20)[0].tolist() == [False, True, True]
    with pytest.raises(BudgetTooSmall):
        solve(reward, tree, 0.0, None, 0.0, budget=3)


def test_free_kv_keeps_everything_and_dear_kv_keeps_one() -> None:
    reward, tree, _ = random_level(np.random.default_rng(3), 12)
    assert solve(reward, tree, 0.0, None, 0.0)[0][reward > 0].all()
    dear = CostTree(tree.parent, tree.cost + 1, tree.leaf)
    kept = solve(reward, dear, 1e4, None, 0.0)[0]
    assert np.unique(dear.leaf[kept]).size == 1


def test_a_cluster_that_a_free_leaf_covers_is_worth_nothing_more() -> None:
    # Leaf 0 costs nothing. Leaf 1 loses .3 - .5 and says what leaf 0 says; leaf 2 loses as much and says something else.
    reward, clusters = np.array([0.4, 0.3, 0.3]), np.array([0, 0, 1])
    tree = CostTree(np.array([-1, -1]), np.array([5.0, 5.0]), np.array([-1, 0, 1]))
    kept, report = solve(reward, tree, 1.0, clusters, 1.0)
    assert kept.tolist() == [True, False, True]
    assert report.objective == pytest.approx(0.7 - 0.5 + 1.0)


def test_of_equal_siblings_the_first_is_kept() -> None:
    # Under one dear step two leaves of equal worth with one meaning, which a third leaf elsewhere has too.
    reward, clusters = np.array([0.25, 0.25, 0.5]), np.array([0, 0, 0])
    tree = CostTree(np.array([-1, 0, 0, -1]), np.array([2.0, 8.0, 8.0, 46.0]), np.array([1, 2, 3]))
    kept, _ = solve(reward, tree, 4.0, clusters, 1.0)
    assert kept.tolist() == [True, False, False]


def test_of_equal_sets_the_larger_is_kept_where_a_leaf_is_free() -> None:
    # A quarter of the cost at weight 1 for a reward of a quarter: leaf 1 adds nothing and takes nothing.
    tree = CostTree(np.array([-1, -1]), np.array([48.0, 16.0]), np.array([0, 1]))
    assert solve(np.array([0.75, 0.25]), tree, 1.0, None, 0.0)[0].tolist() == [True, True]


class OutOfTime:
    """HiGHS as it is when its time ends, with an incumbent or without."""

    def __init__(self, solver: highspy.Highs, has_incumbent: bool) -> None:
        self._solver = solver
        self._has_incumbent = has_incumbent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._solver, name)

    def getModelStatus(self) -> highspy.HighsModelStatus:
        return highspy.HighsModelStatus.kTimeLimit

    def getInfo(self) -> SimpleNamespace:
        names = highspy.SolutionStatus
        status = names.kSolutionStatusFeasible if self._has_incumbent else names.kSolutionStatusNone
        return SimpleNamespace(primal_solution_status=status, mip_gap=0.25)


@pytest.mark.parametrize("has_incumbent", [True, False])
def test_a_time_limit_is_a_result_and_marked_as_such(has_incumbent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = np.array([0.6, 0.3, 0.1])
    tree = CostTree(np.array([-1, 0, 0, -1]), np.array([10.0, 20.0, 5.0, 4.0]), np.array([1, 2, 3]))
    expected, exact = solve(reward, tree, 0.0, None, 0.0, budget=30)
    assert (exact.status, exact.gap, exact.path) == ("optimal", 0.0, "full")
    late = OutOfTime(ilp._solver(), has_incumbent)
    monkeypatch.setattr(ilp, "_solver", lambda: late)
    if not has_incumbent:
        with pytest.raises(SolverFailure, match="HiGHS ended with"):
            solve(reward, tree, 0.0, None, 0.0, budget=30)
        return
    kept, report = solve(reward, tree, 0.0, None, 0.0, budget=30)
    assert (report.status, report.gap) == ("time_limit", 0.25)
    assert kept.tolist() == expected.tolist()
