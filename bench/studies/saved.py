"""What studies of saved trees have in common: rows of `sglang-ets run` go in, one of a data set, width and policy comes out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import rows
from sglang_ets.tools.evaluate import Grader
from sglang_ets.tools.run import rows_in

Key = tuple[str, int, str]  # data, width, policy


def key_of(row: Mapping[str, Any]) -> Key:
    """Of a row of `sglang-ets run`; ETS as published, and at each weight of KV, is a policy of its own."""
    search = row["search_result"]
    policy = search["algorithm"]
    if search["preset"] == "paper":
        policy += " published"
    elif policy == "ets":
        policy += f" b={search['kv_cost_weight']:g}"
    return row["data"], row["width"], policy


Rows = Sequence[Mapping[str, Any]]
Figures = Mapping[Key, Mapping[str, Any]]


def graded(figures: Callable[[Rows, Grader], Figures]) -> Callable[[Rows], Figures]:
    """The same with a grader of its own, which ends with it."""

    def of(made: Rows) -> Figures:
        with Grader() as grader:
            return figures(made, grader)

    return of


def main(
    name: str,
    description: str | None,
    figures: Callable[[Rows], Figures],
    table: Callable[[Rows], str],
) -> None:
    """The command of the study `name`: append the figures of the files that it is given, publish the table of all rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of `sglang-ets run`, with `early_stop` off")
    parser.add_argument("--prm", help="what scored, if data sets of several PRMs stand in one table")
    parser.add_argument("--out", type=Path, help="rows, JSONL; default: the file of this bench under bench/results/")
    parser.set_defaults(smoke=False)  # it needs files that another command has made
    args = parser.parse_args()
    out = rows.out_of(args, name)
    for (data, width, policy), own in figures([row for file in args.files for row in rows_in(file)]).items():
        data = f"{data}, {args.prm}" if args.prm else data
        rows.append(out, {"data": data, "width": width, "policy": policy, **own})
    rows.publish(out, table(list(rows.read(out))))
