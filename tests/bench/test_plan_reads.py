"""Tokens that decode steps read, on a tree small enough to count by hand and on one of a real search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.studies import plan_reads
from sglang_ets.core.attention_plan import MIN_SAVED_TOKENS

TREE = Path(__file__).parents[1] / "data" / "tree_rebase.json"


def node(node_id: int, parent: int, depth: int, *token_ids: int) -> dict[str, Any]:
    return {"id": node_id, "parent": parent, "depth": depth, "token_ids": list(token_ids)}


def test_a_small_tree_counted_by_hand() -> None:
    nodes = [node(1, 0, 1, 5, 6), node(2, 0, 1, 5, 7), node(3, 1, 2, 8)]
    reads = plan_reads.tree_reads(20, nodes)
    # Steps: both children at their first token, which is the same; both at their second; the child of the first.
    assert reads["steps"] == 3
    assert reads["nodes"] == 2 * 21 + 2 * 22 + 23
    assert reads["rows"] == 21 + 2 * 22 + 23
    assert reads["num_rows"] == 1 + 2 + 1
    assert reads["distinct"] == 21 + 23 + 23
    assert reads["cpu"] == 21 + 23 + 23, "the 21 tokens before the two part are read once"
    assert reads["gpu"] == reads["rows"], f"a plan that saves less than {MIN_SAVED_TOKENS} tokens is none"


def test_no_plan_reads_less_than_each_token_once_nor_more_than_rows() -> None:
    tree = json.loads(TREE.read_text(encoding="utf-8"))["search"]["tree"]
    reads = plan_reads.tree_reads(tree["prompt_tokens"], tree["nodes"])
    assert reads["distinct"] <= reads["cpu"] <= reads["gpu"] <= reads["rows"] <= reads["nodes"]
    assert reads["cpu"] < 1.1 * reads["distinct"], "segments of a CPU leave little to read twice"


def test_the_table_has_means_of_a_step_and_ratios() -> None:
    reads = {"nodes": 800, "rows": 600, "gpu": 400, "cpu": 200, "distinct": 100, "num_rows": 40, "steps": 4}
    row = {"data": "embedded", "width": 16, "policy": "ets", "problems": 2, **reads}
    *_, line = plan_reads.table([row | {"nodes": 1}, row]).splitlines()
    assert line == "| embedded | 16 | ets | 2 | 4 | 10.0 | 200 | 150 | 100 | 50 | 25 | 8.0 | 2.0, 4.0 |"
