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
    ranked = rank([trajectory(1, "1", 0.5), trajectory(2, "2", 0.9), trajectory(3, "3", 0.9)], config("best"))
    assert [answer.answer for answer in ranked] == ["2", "3", "1"]


def test_majority_counts_answers_and_none_is_no_vote() -> None:
    finished = [trajectory(1, "1", 0.9), trajectory(2, "2", 0.1), trajectory(3, "2.0", 0.2), trajectory(4, None, 1.0)]
    ranked = rank([*finished, trajectory(5, None, 0.4), replace(finished[3], node_id=6, text="?")], config("majority"))
    assert (ranked[0].answer, ranked[0].votes) == ("2", 2)
    assert [(one.answer, one.score) for one in ranked[-3:]] == [(None, 1.0), (None, 1.0), (None, 0.4)]
    assert len(ranked) == 6, "who does not answer is a result all the same"


def test_the_best_trajectory_of_each_answer_stands_for_it() -> None:
    scores = {1: ("7", 0.2), 2: ("8", 0.3), 3: ("7", 0.9), 4: ("8", 0.4), 5: ("7", 0.5)}
    finished = [
        replace(trajectory(number, answer, score), text=f"{number}. The answer is {answer}")
        for number, (answer, score) in scores.items()
    ]
    ranked = rank(finished, config("majority"))
    assert [(one.answer, one.score) for one in ranked] == [("7", 0.9), ("8", 0.4), ("7", 0.5), ("7", 0.2), ("8", 0.3)]


def test_weighted_majority_adds_scores() -> None:
    finished = [trajectory(1, "1", 0.9), trajectory(2, "2", 0.3), trajectory(3, "2", 0.3)]
    assert rank(finished, config("majority"))[0].answer == "2"
    assert rank(finished, config("weighted_majority"))[0].answer == "1"


@pytest.mark.parametrize(("rule", "score"), [("last", 0.4), ("min", 0.4), ("mean", 0.6), ("prod", 0.32)])
def test_aggregation(rule: str, score: float) -> None:
    (only,) = rank([trajectory(1, "1", 0.8, 0.4)], config("best", score_aggregation=rule))
    assert only.score == pytest.approx(score)
    assert only.step_scores == (0.8, 0.4)


def test_trajectories_without_any_score_are_ranked_last() -> None:
    ranked = rank([trajectory(1, "1"), trajectory(2, "2", 0.1)], config("best"))
    assert [answer.answer for answer in ranked] == ["2", "1"]


def test_votes_of_answers_that_the_caller_joins_are_one() -> None:
    finished = [trajectory(1, "1", 0.5), trajectory(2, "2", 0.4), trajectory(3, "3", 0.4), trajectory(4, "2", 0.1)]
    questions: list[list[str]] = []

    def odd_and_even(answers: Sequence[str]) -> list[int]:
        questions.append(list(answers))
        return [int(answer) % 2 for answer in answers]

    ranked = rank(finished, config("majority"), odd_and_even)
    assert questions == [["1", "2", "3"]]
    assert [(answer.answer, answer.votes) for answer in ranked] == [("1", 2), ("2", 2), ("3", 2), ("2", 2)]
    rank(finished[:1], config("majority"), odd_and_even)
    assert len(questions) == 1  # one answer equals itself


@pytest.mark.parametrize("answer", ["best", "majority", "weighted_majority"])
def test_repeated_texts_come_after_all_others_and_still_vote(answer: str) -> None:
    finished = [trajectory(1, "1", 0.9), trajectory(2, "1", 0.8), trajectory(3, "2", 0.1), trajectory(4, "1", 0.9)]
    longer = replace(finished[0], node_id=5, text="so " + finished[0].text, step_scores=(0.2,))
    ranked = rank([*finished, longer], config(answer))
    others = [longer, finished[2]] if answer == "best" else [finished[2], longer]
    assert [one.text for one in ranked] == [one.text for one in (finished[0], *others, finished[0], finished[0])]
    assert ranked[0].votes == pytest.approx(2.8 if answer == "weighted_majority" else 4)
