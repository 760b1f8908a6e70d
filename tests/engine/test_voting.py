"""Votes by value: equal answers of different texts, and answers that cannot be compared."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from sglang_ets.core.answer import Trajectory
from sglang_ets.core.config import SearchConfig
from sglang_ets.engine.voting import MAX_ANSWER_CHARS, Voting

SLOW = "9^{9^{9^{9^9}}}"


@pytest.fixture(scope="module")
def voting() -> Iterator[Voting]:
    made = Voting()
    yield made
    made._process.stop()


def boxed(number: int, answer: str, score: float = 0.5) -> Trajectory:
    return Trajectory(number, (number,), f"so \\boxed{{{answer}}}", (score,), "stop")


def test_equal_values_are_one_vote(voting: Voting) -> None:
    texts = [r"\frac{1}{2}", "0.7", "0.5", "1/2", "x + 1", "1 + x", r"\sqrt{8}", r"2\sqrt{2}", "no mathematics"]
    labels = voting.labels(texts)
    assert [labels.index(label) for label in labels] == [0, 1, 0, 0, 4, 4, 6, 6, 8]


def test_the_majority_is_found_across_spellings(voting: Voting) -> None:
    given = [boxed(1, "0.7"), boxed(2, "0.7"), boxed(3, "0.5"), boxed(4, r"\frac12"), boxed(5, r"\frac{1}{2}")]
    first = voting.submit(given, SearchConfig(answer="majority")).result()[0]
    assert (first.answer, first.votes) == ("0.5", 3)
    first = voting.submit(given, SearchConfig(answer="majority", answer_equality="text")).result()[0]
    assert (first.answer, first.votes) == ("0.7", 2)


def test_integers_start_no_process() -> None:
    made = Voting()
    assert made.labels(["1", "-2", "30"]) == [0, 1, 2]
    assert made._process._process is None


def test_a_hostile_answer_costs_bounded_time_and_nothing_else(voting: Voting) -> None:
    voting.labels(["0.5", "1/2"])  # the process runs
    started = time.monotonic()
    labels = voting.labels(["0.5", SLOW, "1/2", "7" * (MAX_ANSWER_CHARS + 1)])
    assert time.monotonic() - started < 30
    assert len(labels) == 4
    assert labels[1] not in (labels[0], labels[2], labels[3])
    assert voting.labels(["0.5", "1/2"]) == [0, 0]  # it serves the next search
