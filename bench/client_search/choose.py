"""Selection as a client can do it: KV counted in its own tree, the published integer program, PuLP and CBC."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.published_ilp import solve_published
from sglang_ets.core.allocation import rebase_allocation
from sglang_ets.core.clusters import cluster_labels
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.selection import Level, Selection
from sglang_ets.core.tree import Node


def choose(level: Level, config: SearchConfig) -> Selection:
    """As the core selects, with the integer program of ETS in its published form and solved by CBC.

    Raises:
        ValueError: ets without an embedding of every leaf, or with a coverage that the original does not have.
    """
    if config.algorithm not in ("ets", "ets_kv"):
        return config.policy.select(level, config)
    clusters = None
    if config.algorithm == "ets":
        if config.coverage != "uniform":
            raise ValueError(
                f"coverage must be uniform, as published, got {config.coverage!r}; the client knows no other"
            )
        if level.embeddings is None:
            raise ValueError("ets needs an embedding of every leaf, got none; use --encoder or the algorithm ets_kv")
        clusters = cluster_labels(level.embeddings, config.cluster_distance)
    places = np.flatnonzero(kept_leaves(level, config, clusters))
    allocation = np.zeros(level.scores.size, dtype=np.int64)
    allocation[places] = rebase_allocation(level.scores[places], level.remaining_width, config.rebase_temperature)
    return Selection(allocation, clusters)


def kept_leaves(
    level: Level,  # of L leaves
    config: SearchConfig,
    clusters: NDArray[np.int64] | None,  # int64[L]; None: coverage is worth nothing
) -> NDArray[np.bool_]:  # bool[L]
    """The leaves that the integer program keeps."""
    shares = rebase_allocation(level.scores, level.remaining_width, config.rebase_temperature)
    labels = np.zeros(level.scores.size, dtype=np.int64) if clusters is None else clusters
    weight = 0.0 if clusters is None else config.weights.diversity_weight
    return solve_published(
        shares / level.remaining_width, level.costs(config.kv_cost), config.weights.kv_cost_weight, labels, weight
    )


def needs_embedding(node: Node, config: SearchConfig) -> bool:
    """Whether selection will ask for this step's embedding: ets only, and only leaves that may grow."""
    at_end = node.trajectory_tokens >= config.max_tokens or node.depth >= config.max_steps
    return config.algorithm == "ets" and node.finish != "stop" and not at_end
