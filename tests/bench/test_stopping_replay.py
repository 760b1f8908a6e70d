"""A search gone through again on paper, small enough to count by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.studies import stopping
from sglang_ets.math_process import MathProcess


def node(
    node_id: int, parent: int, depth: int, tokens: int, state: str, score: float, answer: str = ""
) -> dict[str, Any]:
    text = f"\\boxed{{{answer}}}" if answer else "step"
    return {"id": node_id, "parent": parent, "depth": depth, "token_ids": [7] * tokens, "state": state, "score": score,
            "text": text}  # fmt: skip


def row(algorithm: str, nodes: list[dict[str, Any]], expected: str, **search: Any) -> dict[str, Any]:
    asked = json.dumps({"algorithm": algorithm, "answer": "majority", "answer_pattern": "boxed", **search})
    found = {
        "algorithm": algorithm,
        "preset": "default",
        "kv_cost_weight": 4.0,
        "tree": {"prompt_tokens": 9, "nodes": nodes},
    }
    return {"data": "toy", "width": 4, "search": asked, "expected": expected, "search_result": found}


FREE = [
    node(1, 0, 1, 2, "complete", 0.5, "3"),
    node(2, 0, 1, 3, "complete", 0.5, "3"),
    node(3, 0, 1, 4, "complete", 0.5, "3"),
    node(4, 0, 1, 4, "retained", 0.8),
    node(5, 4, 2, 6, "complete", 0.9, "8"),
]
LEVELS = [
    node(1, 0, 1, 2, "complete", 0.5, "3"),
    node(2, 0, 1, 5, "retained", 0.6),
    node(3, 0, 1, 3, "pruned", 0.7),
    node(4, 2, 2, 4, "complete", 0.9, "8"),
    node(5, 2, 2, 6, "complete", 0.9, "8"),
]


def test_trajectories_that_do_not_wait_make_a_moment_each() -> None:
    found = stopping.Replay(FREE, stopping.config_of(row("best_of_n", FREE, "3")), is_free=True).moments()
    assert [moment.decode_steps for moment in found] == [2, 3, 4, 10]
    assert [moment.tokens for moment in found] == [2 * 4, 2 + 3 * 3, 2 + 3 + 4 + 4, 19]
    assert [(m.ballot.num_left, len(m.ballot.scores), m.answer) for m in found] == [
        (3, 1, "3"), (2, 2, "3"), (1, 3, "3"), (0, 4, "3"),
    ]  # fmt: skip
    assert [moment.ballot.promise for moment in found[:3]] == [0.0, 0.0, 0.8], "the fourth has ended a step at 4 tokens"


def test_levels_make_moments_and_wait_for_their_longest_step() -> None:
    found = stopping.Replay(LEVELS, stopping.config_of(row("ets", LEVELS, "8")), is_free=False).moments()
    assert [(moment.decode_steps, moment.tokens, moment.answer) for moment in found] == [(5, 10, "3"), (11, 20, "8")]
    assert found[0].ballot.promise == pytest.approx(0.7), "those that selection will prune are still there"


def test_rules_end_where_they_would_and_changes_are_counted() -> None:
    judge = MathProcess()
    made = stopping.figures([row("best_of_n", FREE, "3"), row("ets", LEVELS, "8")], judge)
    free, levels = made["toy", 4, "best_of_n"], made["toy", 4, "ets b=4"]
    assert free["rules"]["settled"] == {
        "searches": 1, "tokens": 13, "decode_steps": 4, "changed": 0, "right": 1, "ended_early": 1,
    }  # fmt: skip
    assert free["rules"]["off"]["tokens"] == 19 and free["kept"]["1"] == [1, 1]
    assert levels["rules"]["likely 0.95"]["ended_early"] == 0
    ended = levels["rules"]["likely 0.8"]  # one vote, two to come: it stays the winner with 5 / 6, and here it does not
    assert (ended["ended_early"], ended["changed"], ended["right"], levels["kept"]["0.8"]) == (1, 1, 0, [0, 1])
    judge.stop()
    text = stopping.table([{"data": "toy", "width": 4, "policy": "best_of_n", **free}])
    assert "| toy | 4 | best_of_n | settled | 1/1 | 0/1 | 1/1 | 31.6% | 60.0% |" in text
