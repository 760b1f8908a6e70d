"""Grading: exact, mathematical, strict; and answers made to keep a grader busy."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bench.grading import Grade, Grader, disagreement, exact, majority, strict


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader("math", timeout_s=3.0) as made:
        yield made


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        ("1,200.0", "1200", True),
        (r"\frac{1}{2}", "0.5", True),
        ("x+1", "1+x", True),
        ("3", "4", False),
        (None, "4", False),
    ],
)
def test_answers_are_compared_by_value(grader: Grader, answer: str | None, truth: str, is_right: bool) -> None:
    assert grader.grade(answer, truth).is_right is is_right


def test_an_answer_that_takes_too_long_is_wrong_and_counted_and_the_next_is_graded(grader: Grader) -> None:
    before, started = grader.timeouts, time.monotonic()
    grade = grader.grade("9^{9^{9^{9^{9}}}}", "81")
    assert time.monotonic() - started < 60
    assert not grade.is_right
    assert grader.timeouts - before == grade.timed_out
    assert grader.grade("1/4", "0.25").is_right


def test_the_strict_grader_knows_texts_only() -> None:
    assert strict(r"\dfrac12", r"\frac{1}{2}")
    assert strict("12 \\text{cm}", "12cm")
    assert not strict("1/2", "0.5")
    assert exact("12.0", "12")
    assert not exact(None, "12")


def test_disagreement_is_a_share_of_what_both_graded() -> None:
    assert disagreement([Grade(True, True), Grade(True, False), Grade(False)]) == 0.5
    with pytest.raises(ValueError, match="also_strict=True"):
        disagreement([Grade(True)])


def test_majority_joins_spellings_of_a_number() -> None:
    assert majority(["2", None, "2.0", "3"]) == "2"
    assert majority([None]) is None


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Grader("math", num_workers=0)
