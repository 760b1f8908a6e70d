"""Embeddings of the last steps -> one cluster label per leaf."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

MIN_NORM = 1e-12


def cosine_distances(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """float32[L, H] -> float64[L, L], 1 - cosine, exactly symmetric with a zero diagonal; a zero vector is far from all."""
    vectors = embeddings.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.maximum(norms, MIN_NORM)
    distances = 1.0 - vectors @ vectors.T
    distances = np.clip((distances + distances.T) / 2, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    return np.asarray(distances, dtype=np.float64)


def cluster_labels(
    embeddings: NDArray[np.float32],  # float32[L, H]
    cut: float,  # cosine distance, 0..2
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
    condensed = squareform(cosine_distances(embeddings), checks=False)
    labels = fcluster(linkage(condensed, method="average"), t=cut, criterion="distance")
    return first_occurrence_labels(labels)


def first_occurrence_labels(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """Renumber any labels to 0..K-1 in the order in which they first appear."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(first.size, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return np.asarray(rank[inverse], dtype=np.int64)
