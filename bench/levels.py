"""Levels to select from: grown by REBASE from random scores, or taken out of the trees of real searches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
