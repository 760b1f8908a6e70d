"""Grading: by value, by text, and an answer that no grade comes of."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from sglang_ets.math_process import MathProcess
from sglang_ets.tools import grading
from sglang_ets.tools.grading import Grade, grade, majority, strict


@pytest.fixture(scope="module")
def process() -> Iterator[MathProcess]:
    made = MathProcess()
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("1,200.0", "1200", Grade(True, True)),
        (r"\frac{1}{2}", "0.5", Grade(True, False)),
        ("x+1", "1+x", Grade(True, False)),
        ("3", "4", Grade(False, False)),
        (None, "4", Grade(False, False)),
        ("7" * (grading.MAX_ANSWER_CHARS + 1), "4", Grade(False, False)),
    ],
)
def test_answers_are_compared_by_value_and_by_text(
    process: MathProcess, answer: str | None, truth: str, expected: Grade
) -> None:
    assert grade(process, answer, truth) == expected


def test_whole_numbers_start_no_process() -> None:
    made = MathProcess()
    assert [grade(made, answer, "4").is_right for answer in ("4", "-4", "40", "4.0")] == [True, False, False, True]
    assert made._process is None


def test_an_answer_that_takes_too_long_is_wrong_and_marked(
    process: MathProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.ask(["1", "2"], 60)
    assert process._process is not None
    process._process.send_signal(signal.SIGSTOP)  # as slow as can be, however busy the machine
    monkeypatch.setattr(grading, "TIMEOUT_S", 0.05)
    assert grade(process, "1/4", "0.25") == Grade(False, False, timed_out=True)
    monkeypatch.undo()
    assert grade(process, "1/4", "0.25") == Grade(True, False)


def test_the_strict_grader_knows_texts_only() -> None:
    assert strict(r"\dfrac12", r"\frac{1}{2}")
    assert strict("12 \\text{cm}", "12cm")
    assert not strict("1/2", "0.5")


def test_majority_joins_spellings_of_a_number() -> None:
    assert majority(["2", None, "2.0", "3"]) == "2"
    assert majority([None]) is None
