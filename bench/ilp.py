"""Time of one selection: ours (reductions, HiGHS) against the published formulation (PuLP, CBC), same levels, same run.

Timed is all of it: build, solve, decode. What this process has loaded is frozen first, so that no collection of it by Python
falls into one of the timed calls (a server has `/freeze_gc` for that). Ours must never be worse than CBC's by more than 1e-9;
where CBC, with PuLP's default tolerances, is worse than ours, that is counted.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench import rows
from bench.embedded import client_of, held_out_problems
from bench.levels import Case, grown_level, recorded_levels
from bench.published_ilp import solve_published
from bench.server import running_server
from bench.timing import timed
from bench.trees import Node, grow
from sglang_ets.core.ilp import SolverReport, objective, solve

KV_WEIGHT = 1.0
DIVERSITY_WEIGHT = 1.45
EQUAL = 1e-9
NUM_LEVELS = (4, 8, 12)
RECORDED = Path(__file__).parent / "data" / "trees.jsonl.gz"


def compare(cases: Iterable[Case], num_published: int, kv_weight: float) -> dict[str, Any]:
    """Both sides on the same cases, ours on all of them, CBC on the first `num_published`."""
    ours: list[float] = []
    published: list[float] = []
    reports: list[SolverReport] = []
    num_cbc_worse = 0
    for place, case in enumerate(cases):
        args = (case.reward, case.tree, kv_weight, case.clusters, DIVERSITY_WEIGHT)
        (kept, report), elapsed = timed(lambda args=args: solve(*args))  # type: ignore[misc]
        ours.append(elapsed)
        reports.append(report)
        if place < num_published:
            reference, elapsed = timed(lambda args=args: solve_published(*args))  # type: ignore[misc]
            published.append(elapsed)
            gap = objective(kept, *args) - objective(reference, *args)
            if gap < -EQUAL:
                raise RuntimeError(f"case {place}: our objective is {-gap} below CBC's; expected at most {EQUAL}")
            num_cbc_worse += gap > EQUAL
    return {
        "levels": len(ours),
        "levels_cbc": len(published),
        "levels_cbc_worse": num_cbc_worse,
        "ours_ms": _quantiles(ours),
        "cbc_ms": _quantiles(published),
        "ratio": float(np.median(published) / np.median(ours[: len(published)])),
        "paths": dict(Counter(report.path for report in reports)),
        **{key: float(np.median([getattr(r, key) for r in reports])) for key in SIZES},
    }


SIZES = ("rows", "columns", "core_rows", "core_columns")


def _quantiles(times: list[float]) -> dict[str, float]:
    return {name: float(np.percentile(times, q)) for name, q in (("median", 50), ("p95", 95), ("p99", 99))}


def record(widths: list[int], num_problems: int) -> None:
    """Ask a server with the embedded models for whole trees and keep what the integer program saw of them."""
    keep = ("id", "parent", "depth", "token_ids", "score", "cluster")
    RECORDED.parent.mkdir(exist_ok=True)
    with running_server(["--search", "ets"]) as url, gzip.open(RECORDED, "wt", encoding="utf-8") as out:
        client = client_of(url)
        for width in widths:
            for problem in held_out_problems()[-num_problems:]:
                answer = grow(client, problem["prompt"], width, {"algorithm": "ets"}, max_tokens=512)
                nodes = [{key: node[key] for key in keep} for node in answer.search["tree"]["nodes"]]
                out.write(json.dumps({"width": width, "nodes": nodes}) + "\n")


def recorded_trees() -> Iterator[tuple[int, list[Node]]]:
    """Width and nodes of each recorded search."""
    with gzip.open(RECORDED, "rt", encoding="utf-8") as lines:
        for tree in map(json.loads, lines):
            yield tree["width"], tree["nodes"]


def recorded_cases() -> dict[int, list[Case]]:
    """Recorded levels by width."""
    cases: dict[int, list[Case]] = {}
    for width, nodes in recorded_trees():
        cases.setdefault(width, []).extend(recorded_levels(nodes, width))
    return cases


def table(done: Sequence[rows.Row]) -> str:
    """Markdown, one line a setting."""
    header = ["levels", "width", "ours: median, p99 (ms)", "PuLP and CBC: median (ms)", "ratio", "columns",
              "left to HiGHS"]  # fmt: skip
    cells = [
        [
            f"{row['levels']} {row['kind']}", row["width"], f"{row['ours_ms']['median']:.2f}, {row['ours_ms']['p99']:.2f}",
            f"{row['cbc_ms']['median']:.0f}", f"{row['ratio']:.0f}x", f"{row['columns']:.0f}", f"{row['core_columns']:.0f}",
        ]
        for row in done
    ]  # fmt: skip
    return rows.markdown(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--levels", type=int, default=300, help="grown levels for each width")
    parser.add_argument("--levels-cbc", type=int, default=30, help="of these, also solved by CBC")
    parser.add_argument("--kv-weight", type=float, default=KV_WEIGHT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=int, metavar="N", help="record the trees of N problems per width first")
    rows.add_arguments(parser, "widths 16 and 64, few levels")
    args = parser.parse_args()
    if args.smoke:
        args.widths, args.levels, args.levels_cbc = [16, 64], 20, 5
    out = rows.out_of(args, "ilp")
    if args.record:
        record([width for width in args.widths if width <= 256], args.record)
    recorded = recorded_cases()
    gc.collect()
    gc.freeze()
    made = []
    jobs = [(width, kind) for width in args.widths for kind in ("grown", "recorded")]
    for width, kind in tqdm([job for job in jobs if job[1] == "grown" or job[0] in recorded], unit="setting"):
        cases = recorded.get(width, [])
        if kind == "grown":
            depths = [NUM_LEVELS[i % len(NUM_LEVELS)] for i in range(args.levels)]
            cases = [grown_level(width, depth, args.seed * 10_000 + i) for i, depth in enumerate(depths)]
        row = {"kind": kind, "width": width, "kv_weight": args.kv_weight, "seed": args.seed}
        row |= compare(cases, args.levels_cbc, args.kv_weight)
        rows.append(out, row)
        made.append(row)
    rows.publish(out, table(made))


if __name__ == "__main__":
    main()
