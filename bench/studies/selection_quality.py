"""What does each policy keep? One level at a time, on the same levels: right leaves, their share of the width, KV kept.

    python -m bench.studies.selection_quality --smoke
    python -m bench.studies.selection_quality --problems 12 --width 64

Levels come from REBASE searches on validation problems of the embedded task, where it is known of every step whether it is
right. Each policy selects from the very same levels, so nothing but the selection differs. A level counts if it has right
leaves. One setting is one row.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import rows
from bench.testbed.task import Problem, distinct_problems, step_is_right
from bench.trees import rebase_trees
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.selection import Level
from sglang_ets.testing import levels_of

MAX_TOKENS = 512
CUT = 0.3  # of the embedded task
FIGURES = {"kept": "leaves kept", "kv_kept": "KV kept", "right_kept": "right among kept",
           "right_width": "width on right leaves", "all_right_lost": "lost all right"}  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """One level and the truth about its leaves."""

    level: Level
    is_right: NDArray[np.bool_]  # bool[L], the whole path is right


def judged_levels(nodes: Sequence[dict[str, Any]], problem: Problem) -> Iterator[Judged]:
    """The levels of one returned tree (with embeddings) that were selected from and have both right and wrong leaves."""
    right: dict[int, bool] = {0: True}
    for node in nodes:  # a parent comes before its children
        right[node["id"]] = right[node["parent"]] and step_is_right(problem, node["text"])
    for level, leaf_ids in levels_of(nodes):
        truth = np.array([right[leaf_id] for leaf_id in leaf_ids])
        if len(leaf_ids) > 1 and not truth.all() and truth.any():
            yield Judged(replace(level, remaining_width=len(leaf_ids), growth_tokens=0.0), truth)


def quality(judged: Sequence[Judged], config: SearchConfig) -> dict[str, float]:
    """Means over levels."""
    levels: dict[str, list[float]] = {name: [] for name in FIGURES}
    for item in judged:
        allocation = config.policy.select(item.level, config).allocation
        kept = allocation > 0
        levels["kept"].append(kept.mean())
        levels["kv_kept"].append(item.level.kv.share_held(kept))
        levels["right_kept"].append(item.is_right[kept].mean())
        levels["right_width"].append(allocation[item.is_right].sum() / allocation.sum())
        levels["all_right_lost"].append(float(not item.is_right[kept].any()))
    return {name: statistics.fmean(map(float, values)) for name, values in levels.items()}


def configs(width: int) -> Iterator[SearchConfig]:
    """REBASE, beam, and ETS over costs, cost weights, diversity weights, both coverages. DVTS needs trees of its own."""
    for name in ("rebase", "beam"):
        yield SearchConfig(algorithm=name, width=width)  # type: ignore[arg-type]
    for cost in ("tokens", "nodes"):
        for kv_weight in (0.5, 1.0, 2.0):
            for weight in (0.0, 0.5, None):
                yield SearchConfig(
                    algorithm="ets", width=width, kv_cost=cost, kv_cost_weight=kv_weight, diversity_weight=weight,  # type: ignore[arg-type]
                    coverage="uniform", cluster_distance=CUT,
                )  # fmt: skip
    for kv_weight in (1.0, 2.0, 4.0):
        yield SearchConfig(width=width, coverage="reward", kv_cost_weight=kv_weight, cluster_distance=CUT)


def table(done: Sequence[dict[str, Any]]) -> str:
    """Markdown, the latest row of each setting."""
    latest = {(row["width"], row["policy"]): row for row in done}
    header = ["width", "policy", "levels", *FIGURES.values()]
    cells = [
        [row["width"], row["policy"], row["levels"], *(f"{row[name]:.3f}" for name in FIGURES)]
        for row in latest.values()
    ]
    return rows.markdown(header, cells)


def name_of(config: SearchConfig) -> str:
    if config.algorithm != "ets":
        return config.algorithm
    coverage = " reward" if config.coverage == "reward" else ""
    return f"ets b={config.weights.kv_cost_weight:g} d={config.weights.diversity_weight:g} {config.kv_cost}{coverage}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "2 problems at width 8")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.problems = 8, 2
    out = rows.out_of(args, "selection_quality")
    judged: list[Judged] = []
    problems = distinct_problems("validation", args.problems, args.seed)
    prompts = [problem.prompt for problem in problems]
    trees = rebase_trees(prompts, args.width, max_tokens=MAX_TOKENS, temperature=1.0, seed=args.seed)
    for problem, nodes in zip(problems, trees, strict=True):
        judged += judged_levels(nodes, problem)
    for config in configs(args.width):
        row = {"width": args.width, "policy": name_of(config), "problems": args.problems, "seed": args.seed}
        rows.append(out, {**row, "levels": len(judged), **quality(judged, config)})
    rows.publish(out, table(list(rows.read(out))))


if __name__ == "__main__":
    main()
