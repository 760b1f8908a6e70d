"""How many tokens of KV a decode step of a search reads: row by row, as planned, and with each token read once.

    sglang-ets run --data embedded --limit 8 --width 16 64 --algorithm rebase ets --set early_stop=off --out trees.jsonl
    python -m bench.studies.plan_reads trees.jsonl

The trees are those that runs saved, of any model. Each level is decoded again on paper: a node's row is there from the first
token of its step to the last, and its prefix is read for each of them. Counted are rows of all nodes (R0), rows of distinct
prefixes (nodes of equal tokens are one row), what the plans for a GPU and for a CPU leave to be read of these, and distinct
tokens (R1). One width and policy of one model is a row of `--out`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import rows
from bench.studies import saved
from bench.studies.saved import Key, key_of
from bench.trees import Node, trajectory
from sglang_ets.core.attention_plan import (
    MAX_SEGMENTS,
    MAX_SEGMENTS_CPU,
    MIN_SAVED_TOKENS,
    MIN_SAVED_TOKENS_CPU,
    SlotPlanner,
)

PLANS = {"gpu": (MIN_SAVED_TOKENS, MAX_SEGMENTS), "cpu": (MIN_SAVED_TOKENS_CPU, MAX_SEGMENTS_CPU)}
READS = {"nodes": "a row a node (R0)", "rows": "equal tokens one row", "gpu": "planned as on a GPU",
         "cpu": "planned as on a CPU", "distinct": "each token once (R1)"}  # fmt: skip


class Slots:
    """Numbers the KV of token prefixes: the same prefix has the same slot, as in a radix tree with pages of one token."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt = range(prompt_tokens)
        self._children: dict[tuple[int, int], int] = {}

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """The slots of the prompt and of these tokens after it."""
        slots, last = list(self._prompt), -1
        for token in token_ids:
            last = self._children.setdefault((last, token), len(self._prompt) + len(self._children))
            slots.append(last)
        return slots


def level_reads(paths: Sequence[Sequence[int]], step_tokens: Sequence[int]) -> Iterator[dict[str, int]]:
    """Of each decode step of a level: tokens read in each way of `READS`, and rows.

    `paths` are slots up to the last token of each node's step, of which there are `step_tokens`. The token that is computed
    reads all before it, and its own.
    """
    planners = {name: SlotPlanner(*limits) for name, limits in PLANS.items()}
    for place in range(1, max(step_tokens) + 1):
        alive = [path[: len(path) - own + place] for path, own in zip(paths, step_tokens, strict=True) if place <= own]
        distinct = {path[-1]: path for path in alive}  # a slot stands for all before it
        table, lengths = _padded(list(distinct.values()))
        read = {"nodes": sum(map(len, alive)), "rows": int(lengths.sum()), "num_rows": len(distinct)}
        read |= {name: read["rows"] - own.plan(table, lengths).saved_tokens for name, own in planners.items()}
        yield {**read, "distinct": len({slot for path in distinct.values() for slot in path})}


def _padded(paths: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.array([len(path) for path in paths], dtype=np.int64)
    table = np.zeros((len(paths), lengths.max()), dtype=np.int64)
    for row, path in enumerate(paths):
        table[row, : len(path)] = path
    return table, lengths


def tree_reads(prompt_tokens: int, nodes: Sequence[Node]) -> Counter[str]:
    """Sums over the decode steps of all levels of one tree; `steps` counts them."""
    by_id, slots = {node["id"]: node for node in nodes}, Slots(prompt_tokens)
    levels: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        if node["token_ids"]:
            levels[node["depth"]].append(node)
    total: Counter[str] = Counter()
    for level in levels.values():
        paths = [slots.of(trajectory(node, by_id)) for node in level]
        for read in level_reads(paths, [len(node["token_ids"]) for node in level]):
            total.update(read)
            total["steps"] += 1
    return total


def totals(made: Sequence[Mapping[str, Any]]) -> dict[Key, Counter[str]]:
    """By model, width and policy, over the rows of runs."""
    sums: dict[Key, Counter[str]] = defaultdict(Counter)
    for row in made:
        search = row["search_result"]
        key = key_of(row)
        sums[key].update(tree_reads(search["tree"]["prompt_tokens"], search["tree"]["nodes"]))
        sums[key]["problems"] += 1
    return sums


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """Tokens read by a decode step, the mean of all, and how often R1 goes into R0 and into what the plans leave."""
    latest = {(row["data"], row["width"], row["policy"]): row for row in done}
    header = ["data", "width", "policy", "problems", "decode steps", "rows", *READS.values(), "R0 / R1",
              "R0 / planned: GPU, CPU"]  # fmt: skip
    cells = []
    for row in latest.values():
        mean = {name: row[name] / row["steps"] for name in READS}
        saved = f"{mean['nodes'] / mean['gpu']:.1f}, {mean['nodes'] / mean['cpu']:.1f}"
        cells.append([
            row["data"], row["width"], row["policy"], row["problems"], row["steps"],
            f"{row['num_rows'] / row['steps']:.1f}", *(f"{value:,.0f}" for value in mean.values()),
            f"{mean['nodes'] / mean['distinct']:.1f}", saved,
        ])  # fmt: skip
    return rows.markdown(header, cells)


if __name__ == "__main__":
    saved.main("plan_reads", __doc__, totals, table)
