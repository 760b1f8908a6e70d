"""Answers found in texts, and patterns that must not stall the server."""

from __future__ import annotations

import time

import pytest

from sglang_ets.core.patterns import check_pattern, extract_answer, normalise


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        ("boxed", r"so \boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\fbox{ 7 }", "7"),
        ("boxed", r"\boxed{never closed", None),
        ("boxed", "no box", None),
        ("the_answer_is", "The answer is 139", "139"),
        ("the_answer_is", "the answer is: $1,234.50.", "1234.5"),
        ("the_answer_is", "The answer is -3/6", "-1/2"),
        ("the_answer_is", "The answer is 1. No, the answer is 2", "2"),
        ("gsm8k", "work\n#### 1,000", "1000"),
        ("last_number", "from 3 to -4", "-4"),
        (r"result=(\w+)", "result=a result=b", "b"),
    ],
)
def test_extract(pattern: str, text: str, answer: str | None) -> None:
    assert extract_answer(text, pattern) == answer


@pytest.mark.parametrize(
    ("text", "plain"),
    [("1,200.50", "1200.5"), ("4/2", "2"), ("+7", "7"), ("50%", "50"), ("x+1", "x+1"), ("1/0", "1/0")],
)
def test_equal_numbers_become_equal_texts(text: str, plain: str) -> None:
    assert normalise(text) == plain


@pytest.mark.parametrize("pattern", ["(", "no group", "(two)(groups)"])
def test_a_pattern_needs_one_group(pattern: str) -> None:
    with pytest.raises(ValueError, match="one group"):
        check_pattern(pattern)


def test_a_hostile_pattern_is_cut_off() -> None:
    started = time.perf_counter()
    assert extract_answer("a" * 2000 + "b", r"((?:a|aa)+)+$") is None
    assert time.perf_counter() - started < 2.0
