"""Writes the result tables of README.md and docs/results.md from the rows under `bench/results/`: `python -m bench.readme`.

A table stands between two comments that name it; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bench import bench_attention, coverage_term, footprint_tables, rows, selection_quality, sweep
from bench.client_search import table as throughput

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
MAIN_POLICIES = ("greedy", "self_consistency", "best_of_n", "beam", "dvts", "rebase", "ets_kv b=2", "ets b=4")
LONG_RUN = (
    64,
    ("rebase", "dvts", "ets_kv b=2", "ets b=4"),
)  # a width, and the policies that have solved more of its problems
SERVED = "centred on the search so far"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def selection_table() -> str:
    """Latest row of each setting of `bench_ilp.py`."""
    header = [
        "levels",
        "width",
        "ours: median, p99 (ms)",
        "PuLP and CBC: median (ms)",
        "ratio",
        "columns",
        "left to HiGHS",
    ]
    found = _latest("bench_ilp.jsonl", ("width", "kind"))
    cells = [
        [
            f"{row['levels']} {row['kind']}", row["width"], f"{row['ours_ms']['median']:.2f}, {row['ours_ms']['p99']:.2f}",
            f"{row['cbc_ms']['median']:.0f}", f"{row['ratio']:.0f}x", f"{row['columns']:.0f}", f"{row['core_columns']:.0f}",
        ]
        for row in found
    ]  # fmt: skip
    return rows.markdown(header, cells)


def cluster_table() -> str:
    """Latest row of each cut of `bench_clusters.py`."""
    header = ["cut", "leaves", "distinct texts", "distinct meanings", "clusters", "purity", "KV held (mean)", "right"]
    cells = [
        [
            f"{row['cut']:g}", f"{row['leaves']:.1f}", f"{row['distinct_texts']:.1f}", f"{row['distinct_meanings']:.1f}",
            f"{row['clusters']:.1f}", f"{row['purity']:.3f}", f"{row['kv_tokens_mean']:.0f}",
            f"{row['is_right'] * row['problems']:.0f}/{row['problems']}",
        ]
        for row in _latest("clusters.jsonl", ("cut",))
    ]  # fmt: skip
    return rows.markdown(header, cells)


def variants_table() -> str:
    """Last layer, mean over the step's tokens: how well its distance tells meanings apart, latest row of each variant."""
    found = {
        (row["model"], row["normalisation"]): row
        for row in rows.read(rows.RESULTS / "cluster_variants.jsonl")
        if (row["layer"], row["pooling"]) == (-1, "mean")
    }
    models = sorted({model for model, _ in found})
    header = ["hidden states", *(f"{model}: AUC, purity" for model in models)]
    cells = [
        [
            f"{how} (served)" if how == SERVED else how,
            *(f"{found[model, how]['auc']:.2f}, {found[model, how]['purity']:.2f}" for model in models),
        ]
        for how in dict.fromkeys(how for _, how in found)
    ]
    return rows.markdown(header, cells)


def footprint_rows(name: str) -> list[dict[str, Any]]:
    return list(rows.read(rows.RESULTS / f"{name}.jsonl"))


@cache
def footprint() -> tuple[str, list[dict[str, Any]]]:
    """Table and summaries of `kv_footprint.py`, on the problems that every policy of a width has solved."""
    return footprint_tables.table(footprint_rows("kv_footprint"), seed=0)


def long_run_rows() -> list[dict[str, Any]]:
    width, policies = LONG_RUN
    return [row for row in footprint_rows("kv_footprint") if row["width"] == width and row["policy"] in policies]


@cache
def long_run() -> tuple[str, list[dict[str, Any]]]:
    """Table and summaries of `LONG_RUN`, on the problems that all its policies have solved."""
    return footprint_tables.table(long_run_rows(), seed=0)


def headline_table() -> str:
    """The main policies of `kv_footprint.py`, each on all problems it has solved: what they solve and what they hold."""
    header = ["width", "policy", "problems", "accuracy", "vs REBASE (95 %)", "KV tokens held", "KV reduction (95 %)"]
    cells = [
        [
            s["width"], s["policy"], s["problems"], f"{s['accuracy']:.3f}",
            f"{s['difference']:+.3f} [{s['low']:+.3f}, {s['high']:+.3f}]" if "low" in s else "",
            f"{s['kv_tokens_mean']:.0f}" if "kv_tokens_mean" in s else "", footprint_tables.reduced(s),
        ]
        for s in footprint_tables.table(footprint_rows("kv_footprint"), seed=0, shared=False)[1]
        if s["policy"] in MAIN_POLICIES
    ]  # fmt: skip
    return rows.markdown(header, cells)


def equal_table() -> str:
    """The policies at equal tokens and at equal time, from the same rows."""
    return footprint_tables.equal_cost_tables(footprint()[1])


def frontier_table() -> str:
    """Per width, and for `LONG_RUN`, the policies that no other dominates, from the least KV to the most accurate."""
    summaries = footprint()[1]
    widths = sorted({s["width"] for s in summaries if "kv_tokens_mean" in s})
    compared = [[s for s in summaries if s["width"] == width] for width in widths]
    compared.append(long_run()[1])
    cells = []
    for group in sorted(compared, key=lambda group: (group[0]["width"], -len(group))):
        edge = footprint_tables.frontier(group)
        shown = "; ".join(f"{s['policy']} ({s['kv_tokens_mean']:.0f}, {s['accuracy']:.3f})" for s in edge)
        searches = [s["policy"] for s in group if "kv_tokens_mean" in s]
        cells.append([edge[0]["width"], edge[0]["problems"], len(searches), shown])
    return rows.markdown(["width", "problems", "searches", "not dominated (KV tokens held, accuracy)"], cells)


def sweep_table() -> str:
    """The test problems of `sweep.py`."""
    return sweep.split_tables(footprint_rows("sweep"), seed=0)["test"][0]


def attention_table() -> str:
    """Latest row of each case of `bench_attention.py`."""
    return bench_attention.table(_latest("attention.jsonl", ("model", "sequences", "kv_tokens", "new_tokens")))


def coverage_table() -> str:
    """All complete problems of `coverage_term.py`."""
    return coverage_term.markdown(coverage_term.tables(footprint_rows("coverage"), seed=0))


def kept_table() -> str:
    """Latest row of each policy of `selection_quality.py`."""
    return selection_quality.table(list(rows.read(rows.RESULTS / "selection_quality.jsonl")))


def throughput_table() -> str:
    """Search in the scheduler against a client, and against plain sampling, by `throughput.py`."""
    return "\n\n".join(throughput.tables(list(rows.read(rows.RESULTS / "throughput.jsonl"))).split("\n\n")[:2])


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline_table,
    "kv": lambda: footprint()[0],
    "long_run": lambda: long_run()[0],
    "rivals": lambda: footprint_tables.against(long_run_rows(), LONG_RUN[1][-1], seed=0),
    "frontier": frontier_table,
    "equal": equal_table,
    "sweep": sweep_table,
    "kept": kept_table,
    "clusters": cluster_table,
    "variants": variants_table,
    "selection": selection_table,
    "throughput": throughput_table,
    "attention": attention_table,
    "coverage": coverage_table,
}


def _latest(name: str, key: tuple[str, ...]) -> list[dict[str, Any]]:
    by_key = {tuple(row[part] for part in key): row for row in rows.read(rows.RESULTS / name)}
    return [by_key[place] for place in sorted(by_key)]


def rendered(text: str) -> str:
    """The text with every table made anew.

    Raises:
        KeyError: a block names no table.
    """
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
