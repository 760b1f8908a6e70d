"""Writes the result tables of README.md from the rows under `bench/results/`: `python -m bench.readme`.

A table stands between two comments that name it; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import bench_attention, coverage_term, footprint_tables, rows, selection_quality
from bench.client_search import table as throughput

README = Path(__file__).resolve().parents[1] / "README.md"
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


def kv_table(name: str) -> str:
    """All problems of a file of `kv_footprint.py` that every policy of a width has solved."""
    return footprint_tables.table(list(rows.read(rows.RESULTS / f"{name}.jsonl")), seed=0)[0]


def equal_tables(name: str) -> str:
    """The policies at equal tokens and at equal time, from the same rows."""
    _, summaries = footprint_tables.table(list(rows.read(rows.RESULTS / f"{name}.jsonl")), seed=0)
    return footprint_tables.equal_cost_tables(summaries)


def attention_table() -> str:
    """Latest row of each case of `bench_attention.py`."""
    return bench_attention.table(_latest("attention.jsonl", ("model", "sequences", "kv_tokens", "new_tokens")))


def coverage_table() -> str:
    """All complete problems of `coverage.py`."""
    return coverage_term.table(coverage_term.summaries(list(rows.read(rows.RESULTS / "coverage.jsonl")), seed=0))


def kept_table() -> str:
    """Latest row of each policy of `selection_quality.py`."""
    return selection_quality.table(list(rows.read(rows.RESULTS / "selection_quality.jsonl")))


def throughput_table() -> str:
    """Search in the scheduler against a client, and against plain sampling, by `throughput.py`."""
    return "\n\n".join(throughput.tables(list(rows.read(rows.RESULTS / "throughput.jsonl"))).split("\n\n")[:2])


TABLES: dict[str, Callable[[], str]] = {
    "selection": selection_table,
    "clusters": cluster_table,
    "width64": partial(kv_table, "kv_width64"),
    "width64_6_steps": partial(kv_table, "kv_width64_6_steps"),
    "kv_6_steps": partial(kv_table, "kv_footprint_6_steps"),
    "equal_6_steps": partial(equal_tables, "kv_footprint_6_steps"),
    "coverage": coverage_table,
    "kept": kept_table,
    "throughput": throughput_table,
    "attention": attention_table,
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
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
