"""Where the final answer stands in a trajectory's text: presets and users' regular expressions.

Only the last `TAIL_CHARS` characters are searched, a user's expression has a bounded length (`config.MAX_PATTERN_CHARS`)
and one search ends after `SEARCH_TIMEOUT_S`, which the `regex` package enforces while it backtracks. A search that runs out
of time finds nothing. So catastrophic backtracking costs at most that long for each trajectory.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import regex

TAIL_CHARS = 2000
SEARCH_TIMEOUT_S = 0.05
BOXED = "boxed"
NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
PRESETS: dict[str, str | None] = {
    BOXED: None,  # balanced braces are no regular language: see `_last_boxed`
    "the_answer_is": rf"(?i)answer is\s*:?\s*\$?\s*({NUMBER}(?:/\d+)?)",
    "gsm8k": r"####[ \t]*([^\n]+)",
    "last_number": rf"({NUMBER}(?:/\d+)?)",
}


def check_pattern(pattern: str) -> None:
    """Accept a preset's name or a regular expression with exactly one group.

    Raises:
        ValueError: the expression does not compile, or has another number of groups.
    """
    if pattern not in PRESETS:
        _compile(pattern)


def extract_answer(text: str, pattern: str) -> str | None:
    """The last match in the last `TAIL_CHARS` characters, normalised; None if there is none."""
    tail = text[-TAIL_CHARS:]
    if pattern == BOXED:
        found = _last_boxed(tail)
    else:
        found = _last_match(_compile(PRESETS.get(pattern) or pattern), tail)
    return None if found is None else normalise(found)


def normalise(answer: str) -> str:
    """Equal numbers become equal texts (`1,200.50` -> `1200.5`, `4/2` -> `2`); other texts lose outer blanks and `$`."""
    text = answer.strip().strip("$").strip().rstrip(".,").strip()
    plain = text.replace(",", "").removeprefix("+").replace("\\%", "").removesuffix("%")
    if not regex.fullmatch(r"-?(?:\d+(?:\.\d+)?|\.\d+|\d+/\d+)", plain) or regex.search(r"/0+$", plain):
        return text
    value = Fraction(plain)
    if "/" in plain or value.denominator == 1:
        return str(value)
    whole, _, digits = plain.partition(".")
    sign = "-" if value < 0 else ""
    return f"{sign}{int(whole.lstrip('-') or 0)}.{digits.rstrip('0')}"


@functools.lru_cache(maxsize=256)
def _compile(pattern: str) -> Any:
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(
            f"answer_pattern must be one of {', '.join(PRESETS)} or a regular expression with one group, "
            f"got {pattern!r}; it does not compile ({error})"
        ) from None
    if compiled.groups != 1:
        raise ValueError(
            f"answer_pattern must be one of {', '.join(PRESETS)} or a regular expression with one group, "
            f"got {pattern!r}; it has {compiled.groups} groups"
        )
    return compiled


def _last_match(compiled: Any, text: str) -> str | None:
    found = None
    try:
        for match in compiled.finditer(text, timeout=SEARCH_TIMEOUT_S):
            if match.group(1) is not None:
                found = match.group(1)
    except TimeoutError:
        return None
    return found


def _last_boxed(text: str) -> str | None:
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None
