"""The integer program against brute force over all subsets, and against the published formulation solved by CBC."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.levels import grown_level
from bench.published_ilp import solve_published
from sglang_ets.core.allocation import rebase_allocation
from sglang_ets.core.ilp import BudgetTooSmall, CostTree, objective, solve

Problem = tuple[NDArray[np.float64], CostTree, NDArray[np.int64]]


def random_level(draw: np.random.Generator, num_leaves: int, *, unit_costs: bool = False) -> Problem:
    """A level as a search makes it: a random tree, leaves at its last nodes, some of them at the same one."""
    num_inner = int(draw.integers(0, num_leaves + 1))
    parent = [int(draw.integers(-1, node)) for node in range(num_inner)]
    leaf = []
    for _ in range(num_leaves):
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


@pytest.mark.parametrize(("width", "num_seeds"), [(16, 700), (64, 280), (256, 24)])
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
