"""Levels to select from: grown by REBASE from random scores, or taken out of the trees of real searches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.allocation import rebase_allocation
from sglang_ets.core.clusters import first_occurrence_labels
from sglang_ets.core.ilp import CostTree

TEMPERATURE = 0.2  # of REBASE
STEP_TOKENS = (12, 40)  # length of a grown step
NUM_MEANINGS = 3  # different continuations of one state that a step may take
DUPLICATE_RATE = 0.2  # siblings that say the same with the same tokens (12-26 % in a first look at real searches)


@dataclass(frozen=True)
class Case:
    """One level as the integer program gets it."""

    reward: NDArray[np.float64]  # float64[L], sums to 1
    tree: CostTree
    clusters: NDArray[np.int64]  # int64[L]


def grown_level(width: int, num_levels: int, seed: int) -> Case:
    """The last level of a REBASE search: every level samples children by allocation, scores drift from parent to child."""
    draw = np.random.default_rng([width, num_levels, seed])
    parent: list[int] = []
    cost: list[float] = []
    ends, scores, meaning = [-1], [0.5], [0]
    for _ in range(num_levels):
        shares = rebase_allocation(np.array(scores), width, TEMPERATURE)
        level: list[tuple[int, float, int]] = []
        for end, score, state, share in zip(ends, scores, meaning, shares.tolist(), strict=True):
            siblings: list[tuple[int, float, int]] = []
            for _ in range(share):
                if siblings and draw.random() < DUPLICATE_RATE:
                    siblings.append(siblings[int(draw.integers(len(siblings)))])
                    continue
                parent.append(end)
                cost.append(float(draw.integers(*STEP_TOKENS)))
                drifted = float(np.clip(score + draw.normal(0.02, 0.15), 0.0, 1.0))
                siblings.append((len(parent) - 1, drifted, state * NUM_MEANINGS + int(draw.integers(NUM_MEANINGS))))
            level += siblings
        ends, scores, meaning = ([item[place] for item in level] for place in range(3))  # type: ignore[assignment]
    return _case(scores, *_on_paths(parent, cost, ends), meaning, width)


def _on_paths(parent: list[int], cost: list[float], ends: list[int]) -> tuple[list[int], list[float], list[int]]:
    """Without the nodes that no leaf's path goes through: their KV is gone by then."""
    used = set()
    for end in ends:
        node = end
        while node >= 0 and node not in used:
            used.add(node)
            node = parent[node]
    index = {node: place for place, node in enumerate(sorted(used))} | {-1: -1}
    kept = sorted(used)
    return [index[parent[node]] for node in kept], [cost[node] for node in kept], [index[end] for end in ends]


def recorded_levels(nodes: Sequence[dict[str, Any]], width: int) -> Iterator[Case]:
    """The levels of a search that were selected from, out of the `tree.nodes` of its answer (with `return_tree`).

    The cost of a leaf's path is counted in a trie of its tokens, as the radix cache keeps them.
    """
    by_id = {node["id"]: node for node in nodes}
    depths = sorted({node["depth"] for node in nodes if node["depth"] > 0})
    for depth in depths:
        leaves = [n for n in nodes if n["depth"] == depth and n["cluster"] is not None and n["score"] is not None]
        if len(leaves) < 2:
            continue
        parent: list[int] = []
        cost: list[float] = []
        index: dict[tuple[int, tuple[int, ...]], int] = {}
        ends = []
        for leaf in leaves:
            path = []
            node: dict[str, Any] | None = leaf
            while node is not None:
                path.append(tuple(node["token_ids"]))
                node = by_id.get(node["parent"])  # the prompt is not among the nodes
            at = -1
            for step in reversed(path):
                if (at, step) not in index:
                    index[at, step] = len(parent)
                    parent.append(at)
                    cost.append(float(len(step)))
                at = index[at, step]
            ends.append(at)
        yield _case([n["score"] for n in leaves], parent, cost, ends, [n["cluster"] for n in leaves], width)


def _case(
    scores: Sequence[float], parent: list[int], cost: list[float], ends: list[int], groups: list[int], width: int
) -> Case:
    reward = rebase_allocation(np.array(scores), width, TEMPERATURE) / width
    tree = CostTree(np.array(parent, dtype=np.int64), np.array(cost), np.array(ends, dtype=np.int64))
    return Case(reward, tree, first_occurrence_labels(np.array(groups)))
