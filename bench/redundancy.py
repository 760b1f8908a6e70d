"""How much of a search's width says the same thing twice: texts, meanings and clusters of its levels.

A step of the embedded task writes the expression that is left after a colon, so what a step means is known exactly: two leaves
mean the same when the same expression is left.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from bench.trees import Node, trajectory


@dataclass(frozen=True)
class Redundancy:
    """Means over the levels of one search that were selected from."""

    leaves: float
    distinct_texts: float  # token-identical trajectories counted once
    distinct_meanings: float
    clusters: float | None  # None: the policy makes none
    purity: float | None  # share of leaves whose meaning is the commonest of their cluster


def redundancy(nodes: Sequence[Node]) -> Redundancy:
    """Of the nodes of one answer's tree."""
    by_id = {node["id"]: node for node in nodes}
    by_depth: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        if node["score"] is not None and node["finish"] == "step":
            by_depth[node["depth"]].append(node)
    levels = list(by_depth.values())
    texts = [{trajectory(leaf, by_id) for leaf in level} for level in levels]
    meanings = [[meaning(leaf["text"]) for leaf in level] for level in levels]
    clusters = [[leaf["cluster"] for leaf in level] for level in levels]
    clustered = [pair for pair in zip(clusters, meanings, strict=True) if None not in pair[0]]
    return Redundancy(
        leaves=_mean(map(len, levels)),
        distinct_texts=_mean(map(len, texts)),
        distinct_meanings=_mean(len(set(own)) for own in meanings),
        clusters=_mean(len(set(labels)) for labels, _ in clustered) if clustered else None,
        purity=_mean(purity_of(*pair) for pair in clustered) if clustered else None,
    )


def purity_of(clusters: Sequence[Hashable], meanings: Sequence[Hashable]) -> float:
    """Share of leaves whose meaning is the commonest of their cluster, 0..1."""
    members: dict[Hashable, Counter[Hashable]] = {}
    for cluster, what in zip(clusters, meanings, strict=True):
        members.setdefault(cluster, Counter())[what] += 1
    return sum(max(counter.values()) for counter in members.values()) / len(clusters)


def meaning(step: str) -> str:
    """What is left to do after a step: the text after its last colon."""
    return step.rsplit(":", 1)[-1].strip()


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept) if kept else 0.0
