"""Embeddings of the last steps -> one cluster label per leaf."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

# float32[L, H] -> float64[L, L], as `cosine_distances`
Distances = Callable[[NDArray[np.float32]], NDArray[np.float64]]

MIN_NORM = 1e-12
AT_CENTER = 1e-4  # of its length: an embedding this close to the mean differs from it by rounding only


class RunningCenter:
    """The mean of all embeddings of a search so far.

    Hidden states of one prompt share a large common direction, which makes all cosines alike. What is left after taking it away
    separates meanings (`bench/studies`). It depends on the search alone, so equal searches cluster equally.
    """

    def __init__(self) -> None:
        self._sum: NDArray[np.float64] | None = None
        self._count = 0

    def centered(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[L, H] of one level, L >= 1 -> less the mean of this and all levels before; zero where nothing is left."""
        own = embeddings.sum(axis=0, dtype=np.float64)
        self._sum = own if self._sum is None else self._sum + own
        self._count += embeddings.shape[0]
        rest = embeddings - self._sum / self._count
        lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
        rest[np.linalg.norm(rest, axis=1) <= AT_CENTER * lengths] = 0.0
        return np.asarray(rest, dtype=np.float32)


def cosine_distances(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """float32[L, H] -> float64[L, L], 1 - cosine, exactly symmetric with a zero diagonal.

    A zero vector is at distance 0 from other zero vectors and 1 from all else.
    """
    vectors = embeddings.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.maximum(norms, MIN_NORM)
    distances = 1.0 - vectors @ vectors.T
    distances = np.clip((distances + distances.T) / 2, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    return zeros_together(distances, norms[:, 0])


def zeros_together(distances: NDArray[np.float64], norms: NDArray[np.floating]) -> NDArray[np.float64]:
    """float64[L, L], changed in place so that vectors of norm (float[L]) zero are at distance 0 from each other."""
    at_zero = np.flatnonzero(norms <= MIN_NORM)
    distances[np.ix_(at_zero, at_zero)] = 0.0
    return distances


def cluster_labels(
    embeddings: NDArray[np.float32],  # float32[L, H]
    cut: float,  # cosine distance, 0..2
    distances: Distances = cosine_distances,
) -> NDArray[np.int64]:  # int64[L], 0..K-1
    """Average linkage on cosine distance, cut at `cut`; labels are numbered by first occurrence.

    Raises:
        ValueError: not a matrix, or a value that is not finite.
    Source: arXiv 2502.13575, section on coverage (there: sentence embeddings, cut 0.05).
    """
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(f"clusters need a finite matrix of embeddings, got shape {embeddings.shape}")
    if embeddings.shape[0] < 2:
        return np.zeros(embeddings.shape[0], dtype=np.int64)
    condensed = squareform(distances(embeddings), checks=False)
    labels = fcluster(linkage(condensed, method="average"), t=cut, criterion="distance")
    return first_occurrence_labels(labels)


def first_occurrence_labels(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """Renumber any labels to 0..K-1 in the order in which they first appear."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(first.size, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return np.asarray(rank[inverse], dtype=np.int64)
