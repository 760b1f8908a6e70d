"""Measures the shipped models on held-out test problems; writes REPORT.md beside this file.

Takes about five minutes on one CPU thread:

    python -m bench.testbed.evaluate
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from bench.rows import markdown
from bench.testbed.likelihood import area_under_curve, path_scores, step_scores
from bench.testbed.sampling import greedily_right, sample
from bench.testbed.task import Problem, answer_of, split_steps, step_is_right
from bench.testbed.train import MODELS

HERE = Path(__file__).resolve().parent
NUM_SAMPLES = 16


@dataclass(frozen=True)
class Row:
    """One measured number. `standard_error` is None where it is no mean over problems."""

    metric: str
    value: float
    standard_error: float | None
    items: str  # how many of what


def mean_row(metric: str, values: Sequence[float]) -> Row:
    """The mean over problems and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Row(metric, statistics.fmean(values), error, f"{len(values)} problems")


def load_problems(path: Path) -> list[Problem]:
    """The problems of a JSON lines file with expression and answer."""
    rows = map(json.loads, path.read_text().splitlines())
    return [Problem(row["expression"], row["answer"]) for row in rows]


def vote(texts: Sequence[str], weights: Sequence[float]) -> int | None:
    """The answer of the largest total weight, the first sampled among equals; None where no text has one."""
    totals: dict[int, float] = defaultdict(float)
    for text, weight in zip(texts, weights, strict=True):
        answer = answer_of(text)
        if answer is not None:
            totals[answer] += weight
    return max(totals, key=totals.__getitem__, default=None)


def sampled_rows(policy: LlamaForCausalLM, prm: LlamaForCausalLM, chosen: list[Problem], seed: int) -> list[Row]:
    """Everything measured on `NUM_SAMPLES` solutions a problem at temperature 1."""
    solutions = sample(policy, chosen, NUM_SAMPLES, temperature=1.0, seed=seed)
    flat = [(problem, text) for problem, texts in zip(chosen, solutions, strict=True) for text in texts]
    scores = step_scores(prm, flat)
    final = [path_scores(steps)[-1] if steps else 0.0 for steps in scores]
    single, plain, weighted, best, any_right = [], [], [], [], []
    for index, (problem, texts) in enumerate(zip(chosen, solutions, strict=True)):
        weights = final[index * NUM_SAMPLES : (index + 1) * NUM_SAMPLES]
        right = [answer_of(text) == problem.answer for text in texts]
        single.append(sum(right) / len(right))
        any_right.append(float(any(right)))
        plain.append(float(vote(texts, [1.0] * len(texts)) == problem.answer))
        weighted.append(float(vote(texts, weights) == problem.answer))
        best.append(float(right[max(range(len(texts)), key=weights.__getitem__)]))
    return [
        mean_row("policy, sampled at T=1", single),
        mean_row(f"policy, majority of {NUM_SAMPLES}", plain),
        mean_row(f"policy, majority of {NUM_SAMPLES} weighted by the PRM", weighted),
        mean_row(f"policy, best of {NUM_SAMPLES} by the PRM", best),
        mean_row(f"policy, pass@{NUM_SAMPLES}", any_right),
        *verifier_rows(flat, scores),
    ]


def verifier_rows(flat: Sequence[tuple[Problem, str]], scores: Sequence[Sequence[float]]) -> list[Row]:
    """The verifier on steps whose prefix is right: each trajectory's steps up to its first wrong one."""
    values, labels = [], []
    depths: Counter[int] = Counter()
    for (problem, text), row in zip(flat, scores, strict=True):
        for depth, (step, score) in enumerate(zip(split_steps(text), row, strict=True)):
            values.append(score)
            labels.append(step_is_right(problem, step))
            if not labels[-1]:
                depths[depth] += 1
                break
    share = sum(labels) / len(labels)
    return [
        Row("policy, step right given that its prefix is", share, None, f"{len(labels)} steps"),
        Row("PRM, AUC on steps whose prefix is right", area_under_curve(values, labels), None, f"{len(labels)} steps"),
        Row("policy, first errors at the first step", depths[0] / depths.total(), None, f"{depths.total()} errors"),
    ]


PAGE = """\
# The testbed's models, measured

Written by `python -m bench.testbed.evaluate` (sampling seed {seed}, one CPU thread). The problems are the
first of `sglang_ets/models/problems.jsonl`, which no training or validation problem equals.

{table}

The PRM is the policy model after further training and solves more problems than it: a vote weighted by it
measures the search, not what a PRM of the policy's own strength would give. One training seed.
"""


def report(measured: Sequence[Row], seed: int) -> str:
    """The page with the table of all rows."""
    cells = [
        [row.metric, f"{row.value:.3f}", "" if row.standard_error is None else f"{row.standard_error:.3f}", row.items]
        for row in measured
    ]
    return PAGE.format(seed=seed, table=markdown(["", "value", "standard error", "measured on"], cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--num-problems", type=int, default=200, help="problems for the sampled numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = LlamaForCausalLM.from_pretrained(arguments.models / "policy", dtype=torch.float32)
    prm = LlamaForCausalLM.from_pretrained(arguments.models / "prm", dtype=torch.float32)
    chosen = load_problems(arguments.models / "problems.jsonl")
    measured = [
        mean_row("policy, greedy", greedily_right(policy, chosen)),
        mean_row("PRM as a solver, greedy", greedily_right(prm, chosen)),
        *sampled_rows(policy, prm, chosen[: arguments.num_problems], arguments.seed),
    ]
    text = report(measured, arguments.seed)
    (HERE / "REPORT.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
