"""Finished trajectories -> ranked answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sglang_ets.core.config import Aggregation, SearchConfig
from sglang_ets.core.patterns import extract_answer

Partition = Callable[[Sequence[str]], Sequence[int]]  # different answers -> a label each; equal labels are one vote


@dataclass(frozen=True)
class Trajectory:
    """One root-to-leaf path without the prompt."""

    node_id: int
    token_ids: tuple[int, ...]
    text: str
    step_scores: tuple[float, ...]  # scored steps only, in order
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class RankedAnswer:
    """One result of a search. `votes` is a number of trajectories, or their summed scores under a weighted majority."""

    text: str
    token_ids: tuple[int, ...]
    score: float
    step_scores: tuple[float, ...]
    answer: str | None
    votes: float
    finish_reason: Literal["stop", "length"]


def aggregate(step_scores: Sequence[float], rule: Aggregation) -> float:
    """Score of a trajectory; 0 when no step was scored."""
    if not step_scores:
        return 0.0
    if rule == "last":
        return step_scores[-1]
    if rule == "min":
        return min(step_scores)
    if rule == "mean":
        return math.fsum(step_scores) / len(step_scores)
    return math.prod(step_scores)


def rank(trajectories: Sequence[Trajectory], config: SearchConfig, same: Partition | None = None) -> list[RankedAnswer]:
    """Best first, all trajectories. Pure.

    `best` orders by score. The majorities order groups of equal answers by votes, then by summed score; each group's
    best trajectory comes first, so that the first results are different answers; trajectories without an answer come last.
    A text that another trajectory has too comes once, and its repetitions after all others. All ties go to the trajectory
    that comes first. `same` may join answers whose normalised texts differ.
    """
    scores = [aggregate(trajectory.step_scores, config.score_aggregation) for trajectory in trajectories]
    answers = [extract_answer(trajectory.text, config.answer_pattern) for trajectory in trajectories]
    groups = _groups(answers, same)
    votes = [0.0] * len(trajectories)
    for members in groups:
        total = math.fsum(scores[i] for i in members) if config.answer == "weighted_majority" else float(len(members))
        for i in members:
            votes[i] = total
    if config.answer == "best":
        order = sorted(range(len(trajectories)), key=lambda i: (-scores[i], i))
    else:
        order = _by_votes(groups, votes, scores)
        order += sorted((i for i, answer in enumerate(answers) if answer is None), key=lambda i: (-scores[i], i))
    order = _repetitions_last(order, trajectories)
    return [_ranked(trajectories[i], scores[i], answers[i], votes[i]) for i in order]


def _groups(answers: Sequence[str | None], same: Partition | None) -> list[list[int]]:
    """Indices by equal answer, in order of first occurrence."""
    texts = list(dict.fromkeys(answer for answer in answers if answer is not None))
    labels = same(texts) if same is not None and len(texts) > 1 else range(len(texts))
    label_of = dict(zip(texts, labels, strict=True))
    groups: dict[int, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            groups.setdefault(label_of[answer], []).append(i)
    return list(groups.values())


def _by_votes(groups: Sequence[Sequence[int]], votes: Sequence[float], scores: Sequence[float]) -> list[int]:
    def strength(members: Sequence[int]) -> tuple[float, float, int]:
        return -votes[members[0]], -math.fsum(scores[i] for i in members), members[0]

    ordered = [sorted(members, key=lambda i: (-scores[i], i)) for members in sorted(groups, key=strength)]
    return [members[0] for members in ordered] + [i for members in ordered for i in members[1:]]


def _repetitions_last(order: Sequence[int], trajectories: Sequence[Trajectory]) -> list[int]:
    """Repeated texts would be results that add nothing; they still count as votes."""
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(trajectories[i].text, i)
    return [*first.values()] + [i for i in order if first[trajectories[i].text] != i]


def _ranked(trajectory: Trajectory, score: float, answer: str | None, votes: float) -> RankedAnswer:
    return RankedAnswer(
        trajectory.text, trajectory.token_ids, score, trajectory.step_scores, answer, votes, trajectory.finish_reason
    )
