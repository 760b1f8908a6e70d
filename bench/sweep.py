"""Cost weights tuned on validation problems, then tried on held-out ones: accuracy against KV over both weights of ETS.

    python -m bench.sweep --smoke
    python -m bench.sweep --width 16 --problems 100 --test-problems 400 --servers 2

Every pair of `kv_cost_weight` (b) and `diversity_weight` (d; 0 is ETS-KV) solves the validation problems. Chosen is the pair
that holds the least KV among those whose accuracy is at most `TOLERANCE` below that of REBASE. Only this one, REBASE and the
policies without weights then see the test problems. One problem under one setting is a row; an interrupted run goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from bench import rows
from bench.figures import curves, panels
from bench.footprint_tables import BASELINE, frontier, tables_by
from bench.kv_footprint import PROBLEMS, Setting, add_run_arguments, run_all
from bench.testbed.task import distinct_problems

TOLERANCE = 0.01
PLAIN = ("best_of_n", "dvts", BASELINE)
SPLITS = ("validation", "test")


def plain_settings(width: int) -> list[Setting]:
    """The policies that have no weights."""
    return [Setting(name, width, {"algorithm": name}) for name in PLAIN]


def grid(width: int, kv_weights: Sequence[float], diversity_weights: Sequence[float]) -> list[Setting]:
    """ETS, covering by reward, at every pair of weights."""
    return [
        Setting(
            f"ets b={b:g} d={d:g}",
            width,
            {"algorithm": "ets", "coverage": "reward", "kv_cost_weight": b, "diversity_weight": d},
        )
        for b, d in product(kv_weights, diversity_weights)
    ]


def chosen(summaries: Sequence[dict[str, Any]]) -> str:
    """The policy of the least KV among those of ETS that are as accurate as REBASE, within `TOLERANCE`; without any such, the
    most accurate one.
    """
    base = next(s["accuracy"] for s in summaries if s["policy"] == BASELINE)
    tuned = [s for s in summaries if s["policy"].startswith("ets ")]
    good = [s for s in tuned if s["accuracy"] >= base - TOLERANCE]
    best = min(good, key=lambda s: s["kv_tokens_mean"]) if good else max(tuned, key=lambda s: s["accuracy"])
    return str(best["policy"])


def split_tables(done: Sequence[dict[str, Any]], seed: int) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Table and summaries of each split that has rows."""
    return tables_by(done, "split", SPLITS, seed)


def plot(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Validation accuracy against KV: a curve over b for each d, and the edge that nothing dominates."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for s in summaries:
        points[s["policy"].split(" d=")[-1]].append((s["kv_tokens_mean"], s["accuracy"]))
    edge = frontier(summaries)
    with panels(path, 1, width=6.5, height=4.5) as (axis,):
        curves(axis, points, "validation problems")
        axis.plot(
            [s["kv_tokens_mean"] for s in edge],
            [s["accuracy"] for s in edge],
            color="grey",
            linestyle=":",
            label="frontier",
        )
        axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--problems", type=int, default=100, help="of the validation split")
    parser.add_argument("--test-problems", type=int, default=400)
    parser.add_argument("--kv-weights", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--diversity-weights", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    add_run_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.width, args.problems, args.test_problems = 4, 2, 2
        args.kv_weights, args.diversity_weights = [1.0], [0.0, 1.0]
    out = rows.out_of(args, "sweep")
    run = {"servers": args.servers, "in_flight": args.in_flight}
    drawn = [
        {"prompt": p.prompt, "answer": p.answer} for p in distinct_problems("validation", args.problems, args.seed)
    ]
    tuned = grid(args.width, args.kv_weights, args.diversity_weights)
    jobs = [(setting, problem) for problem in drawn for setting in [*plain_settings(args.width), *tuned]]
    run_all(jobs, out, args.seed, extra={"split": "validation"}, **run)
    _, summaries = split_tables(list(rows.read(out)), args.seed)["validation"]
    name = chosen(summaries)
    held_out = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()][: args.test_problems]
    tried = [*plain_settings(args.width), *(setting for setting in tuned if setting.name == name)]
    jobs = [(setting, problem) for problem in held_out for setting in tried]
    run_all(jobs, out, args.seed, extra={"split": "test"}, **run)
    tables = split_tables(list(rows.read(out)), args.seed)
    text = "\n\n".join(f"{split}\n\n{tables[split][0]}" for split in SPLITS)
    out.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    plot(summaries, out.with_suffix(".png"))
    print(f"{text}\n\nchosen on validation problems: {name}")


if __name__ == "__main__":
    main()
