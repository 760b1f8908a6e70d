"""When a search may end before its last trajectory: its answer is settled, or likely enough.

A search of which R trajectories are still to come brings at most R more votes. `settled` is the proof that no such votes
change which answer wins, whatever they are; `likely` is a guess with a probability. Step scores lie in 0..1 (all readouts do).
Only the first answer is looked at: with several results asked for, the others could change, so nothing is settled early.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import regex
from scipy.special import betaln, gammaln

from sglang_ets.core.config import Aggregation, SearchConfig

EarlyReason = Literal["settled", "likely"]
MIN_SCORE, MAX_SCORE = 0.0, 1.0
SLACK = 1e-9  # of sums of scores, whose order may differ
_INTEGER = regex.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Ballot:
    """The complete trajectories of a search, and what is known of those to come."""

    scores: tuple[float, ...]  # of the complete trajectories, aggregated
    answers: tuple[str | None, ...]  # normalised; None: no vote
    num_left: int  # trajectories still to come, at most
    ceiling: float  # greatest score that one of these can have
    promise: float  # greatest score that one of these has so far


@dataclass(frozen=True)
class EarlyEnd:
    """What ended a search early, and about what that saved: had the missing trajectories become as long as the others."""

    reason: EarlyReason
    trajectories_saved: int
    levels_saved: int
    tokens_saved: int


def highest_score(step_scores: Sequence[float], rule: Aggregation, max_steps: int) -> float:
    """The greatest score of a trajectory that begins with these step scores and has at most `max_steps` steps."""
    if rule == "min":
        return min(step_scores, default=MAX_SCORE)
    if rule == "prod":
        return math.prod(step_scores)
    if rule == "mean":
        num_left = max(0, max_steps - len(step_scores))
        return (math.fsum(step_scores) + num_left) / max(1, len(step_scores) + num_left)
    return MAX_SCORE


def is_settled(config: SearchConfig, ballot: Ballot) -> bool:
    """Whether no trajectory still to come can change the first answer, whatever its text and its scores. Pure.

    Answers that math-verify may yet call equal in value are counted against the winner together; different integers it
    never joins. Ties are not settled: they fall by rules that look at more than votes.
    """
    if config.num_results > 1 or not ballot.scores or any(not MIN_SCORE <= s <= MAX_SCORE for s in ballot.scores):
        return False
    if config.answer == "best":
        return max(ballot.scores) > ballot.ceiling
    leader, rival = _strengths(config, ballot)
    most = ballot.ceiling if config.answer == "weighted_majority" else 1.0
    return leader > rival + ballot.num_left * most + SLACK


def probability(config: SearchConfig, ballot: Ballot) -> float:
    """How likely it is that the present first answer is that of the whole search, 0..1. Pure.

    `best`: that the best of all trajectories is among those complete, were their order of coming without meaning. Majorities:
    that the leader stays ahead of its strongest rival when the trajectories to come vote for one of both, each for the leader
    with a probability that has the Beta posterior of the votes so far (a Beta-binomial prediction). Under a weighted majority
    a vote to come for the leader weighs what the votes so far weigh on average, and one for the rival as much as any
    trajectory promises: the first to end may be weak ones that agree, and the winner a strong one that ends later.
    """
    if is_settled(config, ballot):
        return 1.0
    num_complete = len(ballot.scores)
    if config.answer == "best" or not num_complete:
        return num_complete / max(1, num_complete + ballot.num_left)
    leader, rival = _strengths(config, ballot)
    own, most = 1.0, 1.0  # weights of a vote to come for the leader and for the rival
    if config.answer == "weighted_majority":
        own, most = math.fsum(ballot.scores) / num_complete, max(*ballot.scores, ballot.promise)
    if leader <= rival or own <= 0.0:
        return 0.0
    needed = math.floor((rival - leader + ballot.num_left * most) / (own + most)) + 1
    return _beta_binomial_tail(max(0, needed), ballot.num_left, 1 + leader / own, 1 + rival / own)


def early_reason(config: SearchConfig, ballot: Ballot) -> EarlyReason | None:
    """Why the search may end now, as `config.early_stop` has it; None if it goes on."""
    if config.early_stop == "off":
        return None
    if is_settled(config, ballot):
        return "settled"
    if config.early_stop == "likely" and probability(config, ballot) >= config.early_stop_probability:
        return "likely"
    return None


def _strengths(config: SearchConfig, ballot: Ballot) -> tuple[float, float]:
    """Votes of the winning answer, and the most that one other answer has or may get by joining texts of equal value."""
    votes: dict[str, list[float]] = {}
    for answer, score in zip(ballot.answers, ballot.scores, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(score if config.answer == "weighted_majority" else 1.0)
    totals = {answer: math.fsum(given) for answer, given in votes.items()}
    if not totals:
        return 0.0, 0.0
    leader = max(totals, key=lambda answer: totals[answer])
    others = {answer: total for answer, total in totals.items() if answer != leader}
    may_join = [answer for answer in others if config.answer_equality == "math" and not _INTEGER.fullmatch(answer)]
    joined = math.fsum(others.pop(answer) for answer in may_join)
    return totals[leader], max(others.values(), default=0.0) + joined


def _beta_binomial_tail(least: int, count: int, a: float, b: float) -> float:
    """P(K >= least) of K ~ BetaBinomial(count, a, b)."""
    k = np.arange(least, count + 1)
    log_choose = gammaln(count + 1) - gammaln(k + 1) - gammaln(count - k + 1)
    return float(min(1.0, np.exp(log_choose + betaln(k + a, count - k + b) - betaln(a, b)).sum()))
