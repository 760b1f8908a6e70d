"""How much of a search's width says the same thing twice: texts, meanings and clusters of its levels.

A step of the embedded task writes the expression that is left after a colon, so what a step means is known exactly: two leaves
mean the same when the same expression is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Redundancy:
    """Means over the levels of one search that were selected from."""

    leaves: float
    distinct_texts: float  # token-identical trajectories counted once
    distinct_meanings: float
    clusters: float | None  # None: the policy makes none
    purity: float | None  # share of leaves whose meaning is the commonest of their cluster


def redundancy(nodes: Sequence[dict[str, Any]]) -> Redundancy:
    """Of the nodes of one answer's tree."""
    by_id = {node["id"]: node for node in nodes}
    levels: dict[int, list[dict[str, Any]]] = {}
    for node in nodes:
        if node["score"] is not None and node["finish"] == "step":
            levels.setdefault(node["depth"], []).append(node)
    counts = [_level(leaves, by_id) for leaves in levels.values()]
    clustered = [(clusters, purity) for *_, clusters, purity in counts if clusters]
    return Redundancy(
        *(_mean(count[place] for count in counts) for place in range(3)),
        _mean(clusters for clusters, _ in clustered) if clustered else None,
        _mean(purity for _, purity in clustered) if clustered else None,
    )


def _level(leaves: list[dict[str, Any]], by_id: dict[int, dict[str, Any]]) -> tuple[int, int, int, int, float]:
    texts = {_trajectory(leaf, by_id) for leaf in leaves}
    meanings = [meaning(leaf["text"]) for leaf in leaves]
    clusters = [leaf["cluster"] for leaf in leaves]
    if None in clusters:
        return len(leaves), len(texts), len(set(meanings)), 0, 0.0
    return len(leaves), len(texts), len(set(meanings)), len(set(clusters)), purity_of(clusters, meanings)


def purity_of(clusters: Sequence[Hashable], meanings: Sequence[Hashable]) -> float:
    """Share of leaves whose meaning is the commonest of their cluster, 0..1."""
    members: dict[Hashable, Counter[Hashable]] = {}
    for cluster, what in zip(clusters, meanings, strict=True):
        members.setdefault(cluster, Counter())[what] += 1
    return sum(max(counter.values()) for counter in members.values()) / len(clusters)


def meaning(step: str) -> str:
    """What is left to do after a step: the text after its last colon."""
    return step.rsplit(":", 1)[-1].strip()


def tree_of(answer: Any) -> dict[str, Any]:
    """The tree in a completion that was asked for with `return_tree`."""
    return answer.search["tree"]  # type: ignore[no-any-return]


def _trajectory(node: dict[str, Any] | None, by_id: dict[int, dict[str, Any]]) -> tuple[int, ...]:
    ids: tuple[int, ...] = ()
    while node is not None:
        ids = (*node["token_ids"], *ids)
        node = by_id.get(node["parent"])
    return ids


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept) if kept else 0.0
