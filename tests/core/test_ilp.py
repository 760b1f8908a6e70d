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

from bench.levels import dvts_level, grown_level, random_forest
from bench.published_ilp import solve_published
from sglang_ets.core import ilp
from sglang_ets.core.ilp import BudgetTooSmall, CostTree, SolverFailure, objective, solve

Problem = tuple[NDArray[np.float64], CostTree, NDArray[np.int64]]


def random_level(draw: np.random.Generator, num_leaves: int, *, unit_costs: bool = False) -> Problem:
    case = random_forest(draw, num_leaves, unit_costs=unit_costs)
    return case.reward, case.tree, case.clusters


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


@st.composite
def levels(draw: st.DrawFn) -> Problem:
    """Any forest, leaves anywhere in it, rewards and costs that are often equal, clusters that do not follow the tree."""
    num_nodes, num_leaves = draw(st.integers(1, 10)), draw(st.integers(1, 8))
    parent = [draw(st.integers(-1, node - 1)) for node in range(num_nodes)]
    cost = draw(st.lists(st.integers(0, 5), min_size=num_nodes, max_size=num_nodes))
    leaf = draw(st.lists(st.integers(-1, num_nodes - 1), min_size=num_leaves, max_size=num_leaves))
    reward = np.array(draw(st.lists(st.integers(0, 5), min_size=num_leaves, max_size=num_leaves)), dtype=np.float64)
    labels = draw(st.lists(st.integers(0, 3), min_size=num_leaves, max_size=num_leaves))
    tree = CostTree(np.array(parent), np.array(cost, dtype=np.float64), np.array(leaf))
    return reward / max(1.0, reward.sum()), tree, np.unique(labels, return_inverse=True)[1].astype(np.int64)


@given(
    problem=levels(),
    weights=st.tuples(st.sampled_from([0.0, 0.5, 1.0, 4.0, 8.0]), st.sampled_from([0.0, 0.5, 1.45, 4.0])),
    by_reward=st.booleans(),
    budget=st.none() | st.integers(-1, 20),
)
def test_nothing_is_better(problem: Problem, weights: tuple[float, float], by_reward: bool, budget: int | None) -> None:
    reward, tree, clusters = problem
    worth = np.bincount(clusters, weights=reward) if by_reward else None

    def value(kept: NDArray[np.bool_]) -> float:
        return objective(kept, reward, tree, weights[0], clusters, weights[1], worth)

    subsets = [np.array(kept) for kept in itertools.product([False, True], repeat=reward.size) if any(kept)]
    fitting = [kept for kept in subsets if budget is None or tree.cost[tree.held(kept)].sum() <= budget]
    if not fitting:
        with pytest.raises(BudgetTooSmall):
            solve(reward, tree, weights[0], clusters, weights[1], budget, worth)
        return
    kept, report = solve(reward, tree, weights[0], clusters, weights[1], budget, worth)
    assert report.status == "optimal"
    assert kept.tolist() in [fit.tolist() for fit in fitting]
    assert value(kept) == pytest.approx(max(map(value, fitting)), abs=1e-9)
    assert report.objective == pytest.approx(value(kept), abs=1e-9)


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
    assert {"reduced", "relaxation"} <= paths


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


def test_branches_of_a_cluster_count_for_what_the_node_where_they_meet_is_kept() -> None:
    # Cluster 0 has a leaf below each child of the root. Both by a half would cover it whole and pay for half of the root: the
    # relaxation must not have that, 0.08 above the optimum.
    tree = CostTree(
        np.array([-1, 0, 0, 1, 0, 1, 2]), np.array([4.0, 2.0, 4.0, 5.0, 2.0, 3.0, 5.0]), np.array([3, 4, 5, 6])
    )
    kept, report = solve(np.full(4, 0.25), tree, 4.0, np.array([0, 1, 1, 0]), 4.0)
    assert kept.tolist() == [True, True, False, False]
    assert report.path == "relaxation"
    assert report.objective == pytest.approx(2.42)


def test_what_is_not_whole_is_solved_as_an_integer_program() -> None:
    paths = []
    for seed in range(6):
        case = dvts_level(64, 4, seed)
        worth = np.bincount(case.clusters, weights=case.reward)
        args = (case.reward, case.tree, 4.0, case.clusters, 4.0)
        kept, report = solve(*args, worth=worth)
        reference = solve_published(*args, worth)
        assert report.status == "optimal"
        assert objective(kept, *args, worth) == pytest.approx(objective(reference, *args, worth), abs=1e-9)
        paths.append(report.path)
    assert "integer" in paths


def test_the_time_limit_does_not_grow_with_what_was_solved_before() -> None:
    case = dvts_level(64, 4, 0)
    assert solve(case.reward, case.tree, 4.0, case.clusters, 4.0)[1].path != "reduced"
    solver = ilp._solver()
    assert (solver.getRunTime(), solver.getOptionValue("time_limit")[1]) == (0.0, ilp.TIME_LIMIT_S)


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
