"""What the integer program need not decide: exact reductions of a level before HiGHS sees it.

A level is a forest of cost nodes. Keeping node v needs its parent, yields `weight[v]` (rewards of the leaves that end there
minus its KV cost) and covers the clusters `covers[v]`, each worth its `bonus` once. Without a KV budget, these keep an optimum:

- worth keeping by itself (weight >= 0): kept whenever its parent is, so it becomes part of its parent; at a root it is kept;
- never worth it: even with every cluster below it counted as new, the subtree loses: dropped;
- a chain: a losing node that covers nothing and has one child is only ever kept with that child: one node;
- of childless siblings that cover the same one cluster, only the one that costs least can be of use (the first on a tie);
- a cluster that is covered for sure is worth nothing any more, and one that only one node covers is part of its weight.

They are repeated until nothing changes. What is left is the core.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NOWHERE = -1  # parent of a root
NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Core:
    """What is decided, and the forest of nodes that is not."""

    kept: list[int]  # original nodes that are kept for sure
    parent: NDArray[np.int64]  # int64[N], -1: nothing undecided above; a parent comes before its children
    weight: NDArray[np.float64]  # float64[N], negative
    members: list[list[int]]  # original nodes that each core node stands for
    covers: list[set[int]]  # clusters not covered yet, by their original labels


@dataclass
class _Forest:
    """The state between passes. Lists are indexed by original node."""

    weight: list[float]
    covers: dict[int, set[int]]  # nodes that cover nothing are left out
    members: list[list[int]]
    parent: dict[int, int]  # of the undecided nodes, from the roots down
    upper: list[float]
    kept: list[int] = field(default_factory=list)
    covered: set[int] = field(default_factory=set)


def reduce_level(
    weight: list[float],  # M values
    parent: list[int],  # M, a parent comes before its children; -1 at a root
    covers: dict[int, set[int]],  # by node; nodes that cover nothing are left out
    covered: set[int],  # clusters that free leaves cover already
    bonus: list[float],  # worth of each cluster when it is covered, not negative
) -> Core:
    """Decide what can be decided. Changes its arguments."""
    num_nodes = len(weight)
    forest = _Forest(
        weight, covers, [[node] for node in range(num_nodes)], dict(enumerate(parent)), [0.0] * num_nodes, [], covered
    )
    while _pass(forest, bonus):
        pass
    index = {node: place for place, node in enumerate(forest.parent)}
    return Core(
        forest.kept,
        np.array([index.get(up, NOWHERE) for up in forest.parent.values()], dtype=np.int64),
        np.array([forest.weight[node] for node in forest.parent], dtype=np.float64),
        [forest.members[node] for node in forest.parent],
        [forest.covers.get(node, set()) for node in forest.parent],
    )


def _pass(forest: _Forest, bonus: list[float]) -> bool:
    """One pass from the leaves to the roots. Returns whether another one may decide more."""
    size = len(forest.parent)
    num_folded = _fold_single_clusters(forest, bonus)
    children: dict[int, list[int]] = {}
    for node in sorted(forest.parent, reverse=True):
        _decide(forest, children, node, bonus)
    undecided: dict[int, int] = {}
    waiting = [(node, NOWHERE) for node in children.get(NOWHERE, [])]
    while waiting:
        node, up = waiting.pop()
        undecided[node] = up
        waiting += [(child, node) for child in children.get(node, ())]
    forest.parent = dict(sorted(undecided.items()))  # a parent's number is smaller than its children's
    return bool(undecided) and (len(undecided) < size or num_folded > 0)


def _decide(forest: _Forest, children: dict[int, list[int]], node: int, bonus: list[float]) -> None:
    """Kept with its parent, dropped, made one with its only child, or left undecided as a child of its parent."""
    above = forest.parent[node]
    below = children.pop(node, [])
    if len(below) > 1 and bonus:
        below = _without_dominated(forest, children, below)
    weight = forest.weight[node]
    if weight >= 0.0:
        _join(forest, node, above)
        if below:
            children.setdefault(above, []).extend(below)
        return
    covers = forest.covers.get(node, NOTHING)
    upper = weight + sum([bonus[cluster] for cluster in covers]) + sum([forest.upper[child] for child in below])
    if upper < 0.0:
        return
    if not covers and len(below) == 1:
        child = below[0]
        forest.weight[child] += weight
        forest.members[child] += forest.members[node]
        forest.upper[child] = upper
        children.setdefault(above, []).append(child)
        return
    forest.upper[node] = upper
    if below:
        children[node] = below
    children.setdefault(above, []).append(node)


def _join(forest: _Forest, node: int, above: int) -> None:
    """`node` is kept whenever `above` is; without one it is kept for sure."""
    covers = forest.covers.pop(node, NOTHING)
    if above == NOWHERE:
        forest.kept += forest.members[node]
        forest.covered |= covers
        return
    forest.weight[above] += forest.weight[node]
    forest.members[above] += forest.members[node]
    if covers:
        forest.covers.setdefault(above, set()).update(covers)


def _without_dominated(forest: _Forest, children: dict[int, list[int]], below: list[int]) -> list[int]:
    """Siblings in order, less the childless ones that another childless one with the same single cluster makes useless."""
    best: dict[int, int] = {}
    useless = set()
    for child in sorted(below):
        covers = forest.covers.get(child, NOTHING)
        if len(covers) != 1 or child in children:
            continue
        (cluster,) = covers
        rival = best.setdefault(cluster, child)
        if rival == child:
            continue
        if forest.weight[child] > forest.weight[rival]:
            best[cluster], child = child, rival
        useless.add(child)
    return [child for child in sorted(below) if child not in useless]


def _fold_single_clusters(forest: _Forest, bonus: list[float]) -> int:
    """Forget clusters covered for sure; give the worth of those that one node covers to that node. Returns how many."""
    owner: dict[int, int] = {}  # cluster -> the only node that covers it, or NOWHERE
    num_folded = 0
    for node, covers in list(forest.covers.items()):
        if node not in forest.parent:
            del forest.covers[node]  # dropped
            continue
        for cluster in covers & forest.covered:
            covers.discard(cluster)
            num_folded += 1
        for cluster in covers:
            owner[cluster] = NOWHERE if cluster in owner else node
    for cluster, node in owner.items():
        if node != NOWHERE:
            forest.weight[node] += bonus[cluster]
            forest.covers[node].discard(cluster)
            num_folded += 1
    return num_folded
