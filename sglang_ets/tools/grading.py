"""Is an answer right? By mathematical equality (math-verify in its cage), and by a second, stricter grader of texts.

An answer that cannot be graded in time is wrong, and marked `timed_out`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_ets.core.patterns import normalise
from sglang_ets.math_process import MathProcess

TIMEOUT_S = 5.0
MAX_ANSWER_CHARS = 1000  # nobody's final answer; sympy's time grows much faster than the text
_BLANKS = re.compile(r"\s+|\\[,;:! ]|\\(?:left|right|displaystyle)\b")
_UNITS = re.compile(r"\\(?:text|mathrm|mbox)\{\s*([^{}]*)\}")
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")  # written in one way only, so that others are unequal


@dataclass(frozen=True)
class Grade:
    """Of one answer, by both graders."""

    is_right: bool
    is_right_strict: bool
    timed_out: bool = False


def grade(process: MathProcess, answer: str | None, truth: str) -> Grade:
    """One answer against the truth; whole numbers are compared without the process."""
    same_text = strict(answer, truth)
    if answer is None:
        return Grade(False, same_text)
    is_same = normalise(answer) == normalise(truth)
    if is_same or len(answer) > MAX_ANSWER_CHARS or all(map(_WHOLE_NUMBER.fullmatch, (answer, truth))):
        return Grade(is_same, same_text)
    labels = process.ask([truth, answer], TIMEOUT_S)
    return Grade(labels == [0, 0], same_text, timed_out=labels is None)


def strict(answer: str | None, truth: str) -> bool:
    """Equal texts once blanks, text commands and ways to write a fraction are made uniform.

    It never calls different things equal that look different, so it marks `1/2` against `0.5` wrong.
    """
    return answer is not None and _plain(answer) == _plain(truth)


def _plain(text: str) -> str:
    plain = _BLANKS.sub("", _UNITS.sub(r"\1", text.strip().strip("$")))
    plain = plain.replace("dfrac", "frac").replace("tfrac", "frac").replace("^{\\circ}", "").replace("^\\circ", "")
    plain = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", plain)
    return normalise(plain.replace("\\%", "").replace("\\$", ""))


def majority(answers: Sequence[str | None]) -> str | None:
    """The commonest normalised answer, the first of equals; None where nobody answered."""
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            votes[normalise(answer)] = votes.get(normalise(answer), 0) + 1
    return max(votes, key=lambda answer: votes[answer]) if votes else None
