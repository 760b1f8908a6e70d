"""What does each policy keep? One level at a time, on the same levels: right leaves, their share of the width, KV kept.

    python -m bench.selection_quality --smoke
    python -m bench.selection_quality --problems 12 --width 64

Levels come from REBASE searches on validation problems of the embedded task, where it is known of every step whether it is
right. Each policy selects from the very same levels, so nothing but the selection differs. A level counts if it has right
leaves. One setting is one row.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai
from numpy.typing import NDArray
from tqdm import tqdm

from bench import rows
from bench.server import running_server
from bench.testbed.task import Problem, distinct_problems, step_is_right
from sglang_ets.core.clusters import RunningCenter
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import CostTree
from sglang_ets.core.selection import Level, get_policy

MAX_TOKENS = 512


@dataclass(frozen=True)
class Judged:
    """One level and the truth about its leaves."""

    level: Level
    is_right: NDArray[np.bool_]  # bool[L], the whole path is right


def judged_levels(nodes: Sequence[dict[str, Any]], problem: Problem, width: int) -> Iterator[Judged]:
    """The levels of one returned tree (with embeddings) that were selected from and have both right and wrong leaves."""
    by_id = {node["id"]: node for node in nodes}
    right: dict[int, bool] = {0: True}
    for node in nodes:  # a parent comes before its children
        right[node["id"]] = right[node["parent"]] and step_is_right(problem, node["text"])
    center = RunningCenter()
    for depth in sorted({node["depth"] for node in nodes}):
        leaves = [n for n in nodes if n["depth"] == depth and n["finish"] == "step" and n["embedding"] is not None]
        truth = np.array([right[leaf["id"]] for leaf in leaves])
        if leaves:
            embeddings = center.centered(np.array([leaf["embedding"] for leaf in leaves], dtype=np.float32))
        if len(leaves) < 2 or truth.all() or not truth.any():
            continue
        paths = [_path(leaf, by_id) for leaf in leaves]
        level = Level(
            scores=np.array([leaf["score"] for leaf in leaves]),
            kv=CostTree.from_paths(
                [[(tuple(step["token_ids"]), float(len(step["token_ids"]))) for step in path] for path in paths]
            ),
            nodes=CostTree.from_paths([[(step["id"], 1.0) for step in path] for path in paths]),
            embeddings=embeddings,
            subtree=np.zeros(len(leaves), dtype=np.int64),
            growth_tokens=0.0,
            remaining_width=len(leaves),
        )
        yield Judged(level, truth)


def _path(node: dict[str, Any] | None, by_id: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    path = []
    while node is not None:
        path.append(node)
        node = by_id.get(node["parent"])
    return path[::-1]


def kept_cost(tree: CostTree, kept: NDArray[np.bool_]) -> float:
    """Share of the tree's cost that the kept leaves hold, 0..1."""
    return float(tree.cost[tree.held(kept)].sum() / tree.cost.sum())


def quality(judged: Sequence[Judged], config: SearchConfig) -> dict[str, float]:
    """Means over levels."""
    found: dict[str, list[float]] = {
        "kept": [],
        "kv_kept": [],
        "right_kept": [],
        "right_width": [],
        "all_right_lost": [],
    }
    for item in judged:
        allocation = get_policy(config.algorithm).select(item.level, config).allocation
        kept = allocation > 0
        found["kept"].append(kept.mean())
        found["kv_kept"].append(kept_cost(item.level.kv, kept))
        found["right_kept"].append(item.is_right[kept].mean())
        found["right_width"].append(allocation[item.is_right].sum() / allocation.sum())
        found["all_right_lost"].append(float(not item.is_right[kept].any()))
    return {name: statistics.fmean(map(float, values)) for name, values in found.items()}


def configs(width: int) -> Iterator[SearchConfig]:
    """REBASE, beam, and ETS over costs, cost weights, diversity weights, both coverages. DVTS needs trees of its own."""
    for name in ("rebase", "beam"):
        yield SearchConfig(algorithm=name, width=width)  # type: ignore[arg-type]
    for cost in ("tokens", "nodes"):
        for kv_weight in (0.5, 1.0, 2.0):
            for weight in (0.0, 0.5, None):
                yield SearchConfig(
                    algorithm="ets", width=width, kv_cost=cost, kv_cost_weight=kv_weight, diversity_weight=weight,  # type: ignore[arg-type]
                    coverage="uniform",
                )  # fmt: skip
    for kv_weight in (1.0, 2.0, 4.0):
        yield SearchConfig(algorithm="ets", width=width, kv_cost_weight=kv_weight)


def trees(
    problems: Sequence[Problem], width: int, seed: int, prm: str | None
) -> Iterator[tuple[Problem, list[dict[str, Any]]]]:
    """One REBASE search a problem, with its tree."""
    flags = ["--search", "rebase", *(["--prm-model-path", prm] if prm else [])]
    search = {"algorithm": "rebase", "return_tree": True, "return_embeddings": True}
    with running_server(flags) as url, ThreadPoolExecutor(2) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)

        def grow(problem: Problem) -> list[dict[str, Any]]:
            answer = client.completions.create(
                model="default", prompt=problem.prompt, max_tokens=MAX_TOKENS, temperature=1.0, seed=seed,
                extra_body={"search_width": width, "search": search},
            )  # fmt: skip
            return list(answer.metadata["search"]["tree"]["nodes"])  # type: ignore[attr-defined]

        yield from zip(problems, tqdm(pool.map(grow, problems), total=len(problems), unit="tree"), strict=True)


def table(done: Sequence[dict[str, Any]]) -> str:
    """Markdown, the latest row of each setting."""
    latest = {(row["width"], row["policy"]): row for row in done}
    header = [
        "width",
        "policy",
        "levels",
        "leaves kept",
        "KV kept",
        "right among kept",
        "width on right leaves",
        "lost all right",
    ]
    names = ("kept", "kv_kept", "right_kept", "right_width", "all_right_lost")
    cells = [
        [row["width"], row["policy"], row["levels"], *(f"{row[name]:.3f}" for name in names)] for row in latest.values()
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
    for problem, nodes in trees(distinct_problems("validation", args.problems, args.seed), args.width, args.seed, None):
        judged += judged_levels(nodes, problem, args.width)
    for config in configs(args.width):
        row = {"width": args.width, "policy": name_of(config), "problems": args.problems, "seed": args.seed}
        rows.append(out, {**row, "levels": len(judged), **quality(judged, config)})
    text = table(list(rows.read(out)))
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
