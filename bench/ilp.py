"""Time of one selection: ours (reductions, HiGHS) against the published formulation (PuLP, CBC), same levels, same run.

Timed is all of it: build, solve, decode, in time of processors, so that a busy machine makes no tail. What this process has
loaded is frozen first, so that no collection of it by Python falls into one of the timed calls (a server has `/freeze_gc` for
that). Ours must never be worse than CBC's by more than 1e-9; where CBC, with PuLP's default tolerances, is worse than
ours, that is counted.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench import rows
from bench.embedded import client_of, held_out_problems
from bench.levels import Case, crossing_level, dvts_level, grown_level, random_forest, recorded_levels
from bench.published_ilp import solve_published
from bench.server import running_server
from bench.timing import processor_s, timed
from bench.trees import Node, grow
from sglang_ets.core.config import Coverage, SearchConfig
from sglang_ets.core.ilp import SolverReport, objective, solve

COVERAGES: tuple[Coverage, ...] = ("uniform", "reward")  # with the weights that a search of that width has
EQUAL = 1e-9
NUM_LEVELS = (4, 8, 12)
GROWN = {
    "grown": grown_level,
    "crossing": crossing_level,
    "dvts": dvts_level,
    "random": lambda width, num_levels, seed: random_forest(np.random.default_rng([width, num_levels, seed]), width),
}
KINDS = ("recorded", *GROWN)
USUAL = ("recorded", "grown", "crossing")  # the others are forests that no search grows, and slow
BY_CBC = ("recorded", "grown")  # it takes minutes for one of the others
RECORDED = Path(__file__).parent / "data" / "trees.jsonl.gz"


def compare(cases: Iterable[Case], num_published: int, config: SearchConfig) -> dict[str, Any]:
    """Both sides on the same cases, ours on all of them, CBC on the first `num_published`."""
    ours: list[float] = []
    published: list[float] = []
    reports: list[SolverReport] = []
    num_cbc_worse = 0
    weights = config.weights
    for place, case in enumerate(cases):
        args = (case.reward, case.tree, weights.kv_cost_weight, case.clusters, weights.diversity_weight)
        worth = np.bincount(case.clusters, weights=case.reward) if config.coverage == "reward" else None
        (kept, report), elapsed = timed(lambda args=args, worth=worth: solve(*args, worth=worth), processor_s)  # type: ignore[misc]
        ours.append(elapsed)
        reports.append(report)
        if place < num_published:
            reference, elapsed = timed(lambda args=args, worth=worth: solve_published(*args, worth), processor_s)  # type: ignore[misc]
            published.append(elapsed)
            gap = objective(kept, *args, worth) - objective(reference, *args, worth)
            if gap < -EQUAL and report.status == "optimal":
                raise RuntimeError(f"case {place}: our objective is {-gap} below CBC's; expected at most {EQUAL}")
            num_cbc_worse += gap > EQUAL
    return {
        "levels": len(ours),
        "levels_cbc": len(published),
        "levels_cbc_worse": num_cbc_worse,
        "ours_ms": _quantiles(ours),
        "cbc_ms": _quantiles(published) if published else None,
        "ratio": float(np.median(published) / np.median(ours[: len(published)])) if published else None,
        "paths": dict(Counter(report.path for report in reports)),
        "out_of_time": sum(report.status == "time_limit" for report in reports),
        **{key: float(np.median([getattr(r, key) for r in reports])) for key in SIZES},
    }


SIZES = ("rows", "columns", "core_rows", "core_columns")


def _quantiles(times: list[float]) -> dict[str, float]:
    return {
        name: float(np.percentile(times, q)) for name, q in (("median", 50), ("p95", 95), ("p99", 99), ("most", 100))
    }


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
    header = [
        "levels",
        "width",
        "coverage",
        "ours: median, p99, most (ms)",
        "solved as integer programs",
        "PuLP and CBC: median (ms)",
        "ratio",
        "columns",
        "left to HiGHS",
    ]
    return rows.markdown(header, [_cells(row) for row in done])


def _cells(row: rows.Row) -> list[str]:
    ours, paths = row["ours_ms"], row["paths"]
    cbc = (f"{row['cbc_ms']['median']:.0f}", f"{row['ratio']:.0f}x") if row["cbc_ms"] else ("", "")
    times = f"{ours['median']:.2f}, {ours['p99']:.2f}, {ours['most']:.2f}"
    integer = f"{paths.get('integer', 0) + paths.get('full', 0)}"
    if row["out_of_time"]:
        integer += f", {row['out_of_time']} out of time"
    sizes = (f"{row['columns']:.0f}", f"{row['core_columns']:.0f}")
    return [f"{row['levels']} {row['kind']}", str(row["width"]), row["coverage"], times, integer, *cbc, *sizes]


def levels_of(kind: str, width: int, num_levels: int, seed: int) -> list[Case]:
    """That many levels that are made, of several depths."""
    depths = [NUM_LEVELS[place % len(NUM_LEVELS)] for place in range(num_levels)]
    return [GROWN[kind](width, depth, seed * 10_000 + place) for place, depth in enumerate(depths)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--forest", nargs="+", choices=KINDS, default=USUAL, help="levels: from where")
    parser.add_argument("--levels", type=int, default=60, help="levels that are made, for each kind and width")
    parser.add_argument("--levels-cbc", type=int, default=10, help="grown and recorded levels that CBC solves too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=int, metavar="N", help="record the trees of N problems per width first")
    rows.add_arguments(parser, "widths 16 and 64, few levels")
    args = parser.parse_args()
    if args.smoke:
        args.widths, args.forest, args.levels, args.levels_cbc = [16, 64], KINDS, 20, 5
    out = rows.out_of(args, "ilp")
    if args.record:
        record([width for width in args.widths if width <= 256], args.record)
    recorded = recorded_cases()
    gc.collect()
    gc.freeze()
    made = []
    jobs = list(itertools.product(args.widths, args.forest, COVERAGES))
    for width, kind, coverage in tqdm(
        [job for job in jobs if job[1] != "recorded" or job[0] in recorded], unit="setting"
    ):
        cases = recorded[width] if kind == "recorded" else levels_of(kind, width, args.levels, args.seed)
        config = SearchConfig(algorithm="ets", width=width, coverage=coverage)
        row = {"kind": kind, "coverage": coverage, "width": width, "seed": args.seed, **config.weights._asdict()}
        row |= compare(cases, args.levels_cbc if kind in BY_CBC else 0, config)
        rows.append(out, row)
        made.append(row)
    rows.publish(out, table(made))


if __name__ == "__main__":
    main()
