"""Levels to select from: grown from random scores in several ways, or taken out of the trees of real searches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bench.trees import Node, trajectory
from sglang_ets.core.allocation import rebase_allocation
from sglang_ets.core.clusters import first_occurrence_labels
from sglang_ets.core.ilp import CostTree
from sglang_ets.core.kv_costs import token_costs

TEMPERATURE = 0.2  # of REBASE
STEP_TOKENS = (12, 40)  # length of a grown step
NUM_MEANINGS = 3  # different continuations of one state that a step may take
DUPLICATE_RATE = 0.2  # siblings that say the same with the same tokens (12-26 % in a first look at real searches)

Leaf = tuple[tuple[int, ...], float, int]  # nodes from the root on, score, meaning


@dataclass(frozen=True)
class Case:
    """One level as the integer program gets it."""

    reward: NDArray[np.float64]  # float64[L], sums to 1
    tree: CostTree
    clusters: NDArray[np.int64]  # int64[L]


def grown_level(width: int, num_levels: int, seed: int) -> Case:
    """The last level of a REBASE search: every level samples children by allocation, scores drift from parent to child."""
    draw = np.random.default_rng([width, num_levels, seed])
    cost: list[float] = []
    paths: list[tuple[int, ...]] = [()]
    scores, meaning = [0.5], [0]
    for _ in range(num_levels):
        shares = rebase_allocation(np.array(scores), width, TEMPERATURE)
        level: list[Leaf] = []
        for path, score, state, share in zip(paths, scores, meaning, shares.tolist(), strict=True):
            siblings: list[Leaf] = []
            for _ in range(share):
                if siblings and draw.random() < DUPLICATE_RATE:
                    siblings.append(siblings[int(draw.integers(len(siblings)))])
                    continue
                cost.append(float(draw.integers(*STEP_TOKENS)))
                drifted = float(np.clip(score + draw.normal(0.02, 0.15), 0.0, 1.0))
                said = state * NUM_MEANINGS + int(draw.integers(NUM_MEANINGS))
                siblings.append(((*path, len(cost) - 1), drifted, said))
            level += siblings
        paths, scores, meaning = ([item[place] for item in level] for place in range(3))  # type: ignore[assignment]
    # Nodes that no leaf's path goes through are left out: their KV is gone by then.
    tree = CostTree.from_paths([[(node, cost[node]) for node in path] for path in paths], by_key=True)
    return _case(scores, tree, meaning, width)


def crossing_level(width: int, num_levels: int, seed: int) -> Case:
    """The same, but what a leaf means is drawn at random out of width / 8 meanings, whatever its parent is.

    Its clusters then couple all of the tree. In `grown_level` leaves mean the same only after ancestors that did.
    """
    case = grown_level(width, num_levels, seed)
    return replace(case, clusters=_random_clusters(case.reward.size, width // 8, [width, num_levels, seed]))


def dvts_level(width: int, num_levels: int, seed: int) -> Case:
    """A level of a DVTS search: in each of sqrt(width) subtrees one path, and sqrt(width) leaves at its end.

    Meanings are drawn at random out of width / 4. DVTS itself asks no integer program; this is what one would have to solve.
    """
    draw = np.random.default_rng([width, num_levels, seed])
    paths: list[list[tuple[int, float]]] = []
    scores: list[float] = []
    for group in range(math.isqrt(width)):
        trunk = [
            (-1 - depth - num_levels * group, float(draw.integers(*STEP_TOKENS))) for depth in range(num_levels - 1)
        ]
        for _ in range(math.isqrt(width)):
            paths.append([*trunk, (len(paths), float(draw.integers(*STEP_TOKENS)))])
            scores.append(float(np.clip(0.5 + draw.normal(0.02 * num_levels, 0.15), 0.0, 1.0)))
    case = _case(scores, CostTree.from_paths(paths), [0] * len(paths), width)
    return replace(case, clusters=_random_clusters(len(paths), width // 4, [width, num_levels, seed]))


def _random_clusters(num_leaves: int, num_clusters: int, seed: list[int]) -> NDArray[np.int64]:
    return first_occurrence_labels(np.random.default_rng(seed).integers(0, num_clusters, num_leaves))


def random_forest(draw: np.random.Generator, num_leaves: int, *, unit_costs: bool = False) -> Case:
    """No search at all: random inner nodes, leaves at any of them, some of them at the same one, meanings at random."""
    num_inner = int(draw.integers(0, num_leaves + 1))
    parent = [int(draw.integers(-1, node)) for node in range(num_inner)]
    leaf: list[int] = []
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
    reward = rebase_allocation(draw.random(num_leaves), num_leaves, TEMPERATURE) / num_leaves
    clusters = np.unique(draw.integers(0, max(1, num_leaves // 2), num_leaves), return_inverse=True)[1]
    return Case(reward, CostTree(np.array(parent, dtype=np.int64), cost, np.array(leaf)), clusters.astype(np.int64))


def recorded_levels(nodes: Sequence[Node], width: int) -> Iterator[Case]:
    """The levels of a search that were selected from, out of the `tree.nodes` of its answer (with `return_tree`)."""
    by_id = {node["id"]: node for node in nodes}
    for depth in sorted({node["depth"] for node in nodes if node["depth"] > 0}):
        leaves = [n for n in nodes if n["depth"] == depth and n["cluster"] is not None and n["score"] is not None]
        if len(leaves) >= 2:
            tree = token_costs([trajectory(leaf, by_id) for leaf in leaves])
            yield _case([n["score"] for n in leaves], tree, [n["cluster"] for n in leaves], width)


def _case(scores: Sequence[float], tree: CostTree, groups: list[int], width: int) -> Case:
    reward = rebase_allocation(np.array(scores), width, TEMPERATURE) / width
    return Case(reward, tree, first_occurrence_labels(np.array(groups)))
