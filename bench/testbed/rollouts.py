"""Rollouts of a policy model: the complete trajectories of a run, in its own tokens and graded."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.trees import path_to
from sglang_ets.core.patterns import extract_answer
from sglang_ets.tools import run as runs
from sglang_ets.tools.datasets import Problem
from sglang_ets.tools.evaluate import Grader


@dataclass(frozen=True)
class Rollout:
    """One complete trajectory in the policy model's own tokens."""

    problem: str
    question: str  # as it was asked
    prompt_ids: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]  # none is empty
    texts: tuple[str, ...]  # of the steps
    is_right: bool


def rollouts_in(path: Path, tokenizer: Any, pattern: str) -> list[Rollout]:
    """The distinct complete trajectories of a run's rows, graded.

    Raises:
        ValueError: the file cannot be read, or its rows have no trees.
    """
    made = {}
    with Grader() as grader:
        for row in runs.rows_in(path):
            nodes = row.get("search_result", {}).get("tree", {}).get("nodes")
            if nodes is None:
                raise ValueError(f"{path.name} must hold rows of `sglang-ets run`, got fields {', '.join(row)}")
            by_id = {node["id"]: node for node in nodes}
            question, prompt_ids = prompt_of(row, tokenizer)
            for end in (node for node in nodes if node["state"] == "complete"):
                trajectory = path_to(end, by_id)
                steps = [node for node in trajectory if node["token_ids"] and node["score"] is not None]
                answer = extract_answer("".join(node["text"] for node in trajectory), pattern)
                token_ids = tuple(tuple(node["token_ids"]) for node in steps)
                texts = tuple(node["text"] for node in steps)
                is_right = grader.of(answer, row["expected"]).is_right
                made[row["problem"], token_ids] = Rollout(
                    row["problem"], question, prompt_ids, token_ids, texts, is_right
                )
    return [rollout for rollout in made.values() if rollout.steps]


def prompt_of(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, tuple[int, ...]]:
    """What was asked, and the tokens that the server had before the first step."""
    question = row["question"]
    if not row["is_chat"]:
        return question, tuple(tokenizer.encode(question if question.endswith("\n") else f"{question}\n"))
    asked = Problem(row["problem"], question, row["expected"]).prompt
    turn = [{"role": "user", "content": asked}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return asked, tuple(tokenizer.encode(rendered, add_special_tokens=False))


def some_of(rollouts: Sequence[Rollout], count: int, seed: int) -> list[Rollout]:
    """At most so many of each problem, drawn blindly: the first ones would be the shortest."""
    draw, kept = random.Random(seed), []
    for name in dict.fromkeys(rollout.problem for rollout in rollouts):
        own = [rollout for rollout in rollouts if rollout.problem == name]
        kept += draw.sample(own, min(count, len(own)))
    return kept


def halves(rollouts: Sequence[Rollout]) -> tuple[list[int], list[int]]:
    """Places of the rollouts of every other problem, in the order in which problems come, and of the rest.

    Raises:
        SystemExit: one half has not both right and wrong rollouts.
    """
    names = list(dict.fromkeys(rollout.problem for rollout in rollouts))
    first = set(names[::2])
    parts = [[at for at, one in enumerate(rollouts) if (one.problem in first) == wanted] for wanted in (True, False)]
    for part in parts:
        if {rollouts[at].is_right for at in part} != {True, False}:
            raise SystemExit(
                f"right and wrong rollouts must be in both halves of the problems, got {len(rollouts)} rollouts of "
                f"{len(names)} problems without; sample more, or easier problems"
            )
    return parts[0], parts[1]
