"""Writes the result tables of `PAGES` from the rows under `bench/results/`: `python -m bench.readme`.

A table stands between two comments that name it; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from bench import attention, capacity, fairness, forks, ilp, real_model, rows, searches, soak, tables
from bench.client_search import table as throughput
from bench.gpu import rehearse
from bench.studies import answers, plan_reads, selection_quality, stopping, survivors
from bench.testbed import verifiers

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(ROOT / page for page in rows.PAGES)
MAIN_POLICIES = ("greedy", "self_consistency", "best_of_n", "beam", "dvts", "rebase", "ets_kv b=2", "ets b=4")
LONG_WIDTH, LONG_POLICIES = 64, ("rebase", "dvts", "ets_kv b=2", "ets b=4")  # which have solved more of its problems
SERVED = "centred on the search so far"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Made = tuple[str, list[rows.Row]]  # a table and its summaries


@cache
def rows_of(name: str) -> list[rows.Row]:
    return list(rows.read(rows.RESULTS / f"{name}.jsonl"))


@cache
def footprint() -> Made:
    """On the problems that every policy of a width has solved."""
    return tables.table(rows_of("kv_footprint"), seed=0)


def long_run_rows() -> list[rows.Row]:
    return [row for row in rows_of("kv_footprint") if row["width"] == LONG_WIDTH and row["policy"] in LONG_POLICIES]


@cache
def long_run() -> Made:
    """On the problems that all policies of the long run have solved."""
    return tables.table(long_run_rows(), seed=0)


def headline_table() -> str:
    """The main policies, each on all problems it has solved: what they solve and what they hold."""
    header = ["width", "policy", "problems", "accuracy", "vs REBASE (95 %)", "KV tokens held", "KV reduction (95 %)"]
    cells = [
        [
            s["width"], s["policy"], s["problems"], f"{s['accuracy']:.3f}", tables.differing(s),
            f"{s['kv_tokens_mean']:.0f}" if "kv_tokens_mean" in s else "", tables.reduced(s),
        ]
        for s in tables.table(rows_of("kv_footprint"), seed=0, shared=False)[1]
        if s["policy"] in MAIN_POLICIES
    ]  # fmt: skip
    return rows.markdown(header, cells)


def frontier_table() -> str:
    """Per width, and for the long run, the policies that no other dominates, from the least KV to the most accurate."""
    summaries = footprint()[1]
    widths = sorted({s["width"] for s in summaries if "kv_tokens_mean" in s})
    compared = [[s for s in summaries if s["width"] == width] for width in widths]
    compared.append(long_run()[1])
    cells = []
    for group in sorted(compared, key=lambda group: (group[0]["width"], -len(group))):
        edge = tables.frontier(group)
        shown = "; ".join(f"{s['policy']} ({s['kv_tokens_mean']:.0f}, {s['accuracy']:.3f})" for s in edge)
        num_searches = sum("kv_tokens_mean" in s for s in group)
        cells.append([edge[0]["width"], edge[0]["problems"], num_searches, shown])
    return rows.markdown(["width", "problems", "searches", "not dominated (KV tokens held, accuracy)"], cells)


def sweep_table() -> str:
    """The problems that the chosen weights were tried on."""
    return tables.by_title(rows_of("sweep"), seed=0)["test problems, strong PRM"][0]


def variants_table() -> str:
    """Last layer, mean over the step's tokens: how well its distance tells meanings apart, latest row of each variant."""
    last = {
        (row["model"], row["normalisation"]): row
        for row in rows_of("cluster_variants")
        if (row["layer"], row["pooling"]) == (-1, "mean")
    }
    models = sorted({model for model, _ in last})
    header = ["hidden states", *(f"{model}: AUC, purity" for model in models)]
    cells = [
        [
            f"{how} (served)" if how == SERVED else how,
            *(f"{last[model, how]['auc']:.2f}, {last[model, how]['purity']:.2f}" for model in models),
        ]
        for how in dict.fromkeys(how for _, how in last)
    ]
    return rows.markdown(header, cells)


def throughput_table() -> str:
    """Search in the scheduler against a client, and against plain sampling."""
    return "\n\n".join(throughput.tables(rows_of("throughput")).split("\n\n")[:2])


def real_model_tables() -> str:
    """Every group under a heading of the page's third level."""
    return real_model.summary(rows_of("real_model"), seed=0)[0].replace("## ", "### ")


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline_table,
    "kv": lambda: footprint()[0],
    "long_run": lambda: long_run()[0],
    "rivals": lambda: tables.against(long_run_rows(), LONG_POLICIES[-1], seed=0),
    "frontier": frontier_table,
    "equal": lambda: tables.equal_cost_tables(footprint()[1]),
    "sweep": sweep_table,
    "kept": lambda: selection_quality.table(rows_of("selection_quality")),
    "clusters": lambda: searches.cut_table(rows_of("cuts")),
    "variants": variants_table,
    "selection": lambda: ilp.table(rows.latest("ilp", ("coverage", "kind", "width"))),
    "throughput": throughput_table,
    "attention": lambda: attention.table(rows.latest("attention", ("model", "sequences", "kv_tokens", "new_tokens"))),
    "attention_tree": lambda: attention.tree_table(rows_of("attention_tree")),
    "plan_reads": lambda: plan_reads.table(rows_of("plan_reads")),
    "capacity": lambda: capacity.table(rows_of("capacity")),
    "profile": lambda: f"```text\n{(rows.RESULTS / 'profile.txt').read_text(encoding='utf-8').strip()}\n```",
    "forks": lambda: forks.table(rows_of("forks")),
    "speculation": lambda: forks.table(rows_of("speculation")),
    "fairness": lambda: fairness.table(rows_of("fairness")),
    "soak": lambda: soak.table(rows_of("soak")),
    "real_model": real_model_tables,
    "prm_head": lambda: verifiers.tables(rows_of("prm_head")),
    "gpu_kit": lambda: rehearse.table(rows_of("gpu_kit_cpu")),
    "stopping": lambda: searches.report("stopping", rows_of("stopping"), seed=0),
    "answers": lambda: answers.table(rows_of("answers")),
    "survivors": lambda: survivors.table(rows_of("survivors")),
    "stopping_replay": lambda: stopping.table(rows_of("stopping_replay")),
    "coverage": lambda: searches.report("coverage", rows_of("coverage"), seed=0),
}


def rendered(text: str) -> str:
    """The text with every table made anew.

    Raises:
        KeyError: a block names no table.
    """
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
