"""Ranking of finished trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sglang_ets.core.answer import rank
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.search import Trajectory


def trajectory(number: int, answer: str | None, *scores: float) -> Trajectory:
    return Trajectory(number, (number,), f"The answer is {answer}" if answer else "none", scores, "stop")


def config(answer: str, **fields: Any) -> SearchConfig:
    return SearchConfig(answer=answer, answer_pattern="the_answer_is", **fields)  # type: ignore[arg-type]


def test_best_takes_the_highest_score_and_the_first_of_equals() -> None:
    found = rank([trajectory(1, "1", 0.5), trajectory(2, "2", 0.9), trajectory(3, "3", 0.9)], config("best"))
    assert [answer.answer for answer in found] == ["2", "3", "1"]


def test_majority_counts_answers_and_none_is_no_vote() -> None:
    given = [trajectory(1, "1", 0.9), trajectory(2, "2", 0.1), trajectory(3, "2.0", 0.2), trajectory(4, None, 1.0)]
    first = rank([*given, trajectory(5, None, 1.0), trajectory(6, None, 1.0)], config("majority"))[0]
    assert (first.answer, first.votes) == ("2", 2)


def test_weighted_majority_adds_scores() -> None:
    given = [trajectory(1, "1", 0.9), trajectory(2, "2", 0.3), trajectory(3, "2", 0.3)]
    assert rank(given, config("majority"))[0].answer == "2"
    assert rank(given, config("weighted_majority"))[0].answer == "1"


@pytest.mark.parametrize(("rule", "score"), [("last", 0.4), ("min", 0.4), ("mean", 0.6), ("prod", 0.32)])
def test_aggregation(rule: str, score: float) -> None:
    (only,) = rank([trajectory(1, "1", 0.8, 0.4)], config("best", score_aggregation=rule))
    assert only.score == pytest.approx(score)
    assert only.step_scores == (0.8, 0.4)


def test_trajectories_without_any_score_are_ranked_last() -> None:
    found = rank([trajectory(1, "1"), trajectory(2, "2", 0.1)], config("best"))
    assert [answer.answer for answer in found] == ["2", "1"]


def test_votes_of_answers_that_the_caller_joins_are_one() -> None:
    given = [trajectory(1, "1", 0.5), trajectory(2, "2", 0.4), trajectory(3, "3", 0.4), trajectory(4, "2", 0.1)]
    asked: list[list[str]] = []

    def odd_and_even(answers: Sequence[str]) -> list[int]:
        asked.append(list(answers))
        return [int(answer) % 2 for answer in answers]

    found = rank(given, config("majority"), odd_and_even)
    assert asked == [["1", "2", "3"]]
    assert [(answer.answer, answer.votes) for answer in found] == [("1", 2), ("2", 2), ("3", 2), ("2", 2)]
    rank(given[:1], config("majority"), odd_and_even)
    assert len(asked) == 1  # one answer equals itself


@pytest.mark.parametrize("answer", ["best", "majority", "weighted_majority"])
def test_repeated_texts_come_after_all_others_and_still_vote(answer: str) -> None:
    given = [trajectory(1, "1", 0.9), trajectory(2, "1", 0.8), trajectory(3, "2", 0.1), trajectory(4, "1", 0.9)]
    longer = replace(given[0], node_id=5, text="so " + given[0].text, step_scores=(0.2,))
    found = rank([*given, longer], config(answer))
    others = [longer, given[2]] if answer == "best" else [given[2], longer]
    assert [one.text for one in found] == [one.text for one in (given[0], *others, given[0], given[0])]
    assert found[0].votes == pytest.approx(2.8 if answer == "weighted_majority" else 4)
