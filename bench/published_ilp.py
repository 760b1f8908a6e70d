"""The published integer program, as the original runs it: PuLP builds it, the CBC program solves it. Baseline and oracle.

Every variable is binary and every leaf has one row for each of its ancestors (ETS, arXiv 2502.13575), here with the costs of
our `CostTree`, so that both sides solve the same problem.
"""

from __future__ import annotations

import numpy as np
import pulp
from numpy.typing import NDArray

from sglang_ets.core.ilp import CostTree


def solve_published(
    reward: NDArray[np.float64],  # float64[L]
    tree: CostTree,
    kv_weight: float,
    clusters: NDArray[np.int64],  # int64[L], 0..K-1
    diversity_weight: float,
    worth: NDArray[np.float64] | None = None,  # float64[K]; None: 1 / K each, as published
) -> NDArray[np.bool_]:  # bool[L]
    """The leaves that CBC keeps."""
    model = pulp.LpProblem(sense=pulp.LpMaximize)
    x = [pulp.LpVariable(f"x{i}", cat="Binary") for i in range(reward.size)]
    y = [pulp.LpVariable(f"y{j}", cat="Binary") for j in range(tree.parent.size)]
    num_clusters = int(clusters.max()) + 1
    z = [pulp.LpVariable(f"z{k}", cat="Binary") for k in range(num_clusters)]
    worths = np.full(num_clusters, 1 / num_clusters) if worth is None else worth
    total = float(tree.cost.sum()) or 1.0
    model += (
        pulp.lpSum(float(r) * v for r, v in zip(reward, x, strict=True))
        - kv_weight * pulp.lpSum(float(c) / total * v for c, v in zip(tree.cost, y, strict=True))
        + diversity_weight * pulp.lpSum(float(w) * v for w, v in zip(worths, z, strict=True))
    )
    for leaf, end in enumerate(tree.leaf.tolist()):
        node = end
        while node >= 0:
            model += x[leaf] <= y[node]
            node = int(tree.parent[node])
    for k in range(num_clusters):
        model += z[k] <= pulp.lpSum(x[i] for i in np.flatnonzero(clusters == k))
    model += pulp.lpSum(x) >= 1
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, gapAbs=1e-10, threads=1))
    return np.array([v.value() > 0.5 for v in x])
