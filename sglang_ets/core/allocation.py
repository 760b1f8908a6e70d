"""Scores and width -> children per leaf."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Shares that are whole numbers up to rounding must not be rounded up to the next one: ties in the published code do.
CEIL_SLACK = 1e-9


def by_score(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices from the best score to the worst; equal scores keep their order."""
    return np.argsort(-scores, kind="stable").astype(np.int64)


def best_places(scores: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Indices of the best so many, in order; of equal scores the first ones."""
    return np.sort(by_score(scores)[:most])


def rebase_allocation(
    scores: NDArray[np.float64],  # float64[L]
    width: int,
    temperature: float,
) -> NDArray[np.int64]:  # int64[L], sums to width
    """REBASE: share `width` in proportion to softmax(scores / temperature), best first, rounding up.

    Each leaf in turn gets ceil(width still free * weight / weight still waiting), so good leaves are rounded up and the
    last ones may get nothing. Equal scores are served in order of index.

    Raises:
        ValueError: no leaf, a negative width, or a score that is not finite.
    Source: arXiv 2408.00724 and its code.
    """
    if scores.ndim != 1 or scores.size == 0 or width < 0 or not np.isfinite(scores).all():
        raise ValueError(
            f"REBASE needs finite scores of at least one leaf and a width of 0 or more, got {scores!r} and {width}"
        )
    order = by_score(scores)
    weights = np.exp((scores[order] - scores[order[0]]) / temperature)
    # Summed from the worst upwards, so that the last leaf's share of what is left is exactly 1.
    waiting = np.cumsum(weights[::-1])[::-1].tolist()
    allocation = np.zeros(scores.size, dtype=np.int64)
    free = width
    for index, weight, rest in zip(order.tolist(), weights.tolist(), waiting, strict=True):
        if free == 0:
            break
        share = min(free, math.ceil(free * (weight / rest) - CEIL_SLACK)) if rest > 0.0 else free
        allocation[index] = share
        free -= share
    return allocation


def inherited_scores(
    scores: NDArray[np.float64],  # float64[L]
    clusters: NDArray[np.int64],  # int64[L], labels 0..K-1
    kept: NDArray[np.bool_],  # bool[L]
    temperature: float,
) -> NDArray[np.float64]:  # float64[L]
    """Scores with which the kept leaves of each cluster weigh in REBASE's softmax what all leaves of the cluster weighed.

    Of several kept leaves each is raised by the same amount. Scores of leaves that are not kept are returned as they are.
    """
    weights = np.exp((scores - scores.max()) / temperature)
    num_clusters = int(clusters.max()) + 1
    whole = np.bincount(clusters, weights=weights, minlength=num_clusters)
    held = np.bincount(clusters[kept], weights=weights[kept], minlength=num_clusters)
    raised = scores.copy()
    heirs = np.flatnonzero(kept & (weights > 0.0))  # a weight of zero has nothing to scale
    total, own = whole[clusters[heirs]], held[clusters[heirs]]
    with np.errstate(over="ignore"):  # of a weight close to the smallest number, which the difference of logs can take
        ratio = total / own
    raised[heirs] += temperature * np.where(np.isinf(ratio), np.log(total) - np.log(own), np.log(ratio))
    return raised


def even_allocation(
    scores: NDArray[np.float64],  # float64[L]
    kept: NDArray[np.int64],  # int64[R], indices of the leaves kept
    width: int,
) -> NDArray[np.int64]:  # int64[L], sums to width
    """Share `width` evenly over the kept leaves; what does not divide goes to the best ones."""
    best_first = kept[by_score(scores[kept])]
    allocation = np.zeros(scores.size, dtype=np.int64)
    allocation[best_first] = width // best_first.size
    allocation[best_first[: width % best_first.size]] += 1
    return allocation
