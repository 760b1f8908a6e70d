"""Where the final answer stands in a trajectory's text: presets and users' regular expressions.

Only the last `TAIL_CHARS` characters are searched, and one search ends after `SEARCH_TIMEOUT_S`, which the `regex` package
enforces while it backtracks. A search that runs out of time matches nothing. So catastrophic backtracking costs at most that
long for each trajectory.

Compiling has no such limit: a few characters can ask for gigabytes. So a user's expression is measured before it is compiled
(`_check_size`), by a reader that knows only the plain part of the syntax and refuses the rest.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import regex

from sglang_ets.core.settings import wrong

TAIL_CHARS = 2000
SEARCH_TIMEOUT_S = 0.05
MAX_PATTERN_CHARS = 500
MAX_NESTING = 20  # groups in groups
MAX_EXPANDED = 5000  # characters, were every repetition written out
MAX_COMPILED = 16  # expressions kept
BOXED = "boxed"
NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
PRESETS: dict[str, str | None] = {
    BOXED: None,  # balanced braces are no regular language: see `_last_boxed`
    "the_answer_is": rf"(?i)answer is\s*:?\s*\$?\s*({NUMBER}(?:/\d+)?)",
    "gsm8k": r"####[ \t]*([^\n]+)",
    "last_number": rf"({NUMBER}(?:/\d+)?)",
}


def check_pattern(value: object) -> None:
    """Accept a preset's name or a regular expression with exactly one group, of bounded size.

    Raises:
        ValueError: one sentence; nothing has been compiled unless the expression is small.
    """
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_PATTERN_CHARS:
        rule = f"a preset name or a regular expression of 1 to {MAX_PATTERN_CHARS} characters"
        raise wrong("answer_pattern", rule, value, "for example boxed")
    if value not in PRESETS:
        _compile(value)


def extract_answer(text: str, pattern: str) -> str | None:
    """The last match in the last `TAIL_CHARS` characters, normalised; None if there is none."""
    tail = text[-TAIL_CHARS:]
    if pattern == BOXED:
        answer = _last_boxed(tail)
    else:
        answer = _last_match(_compile(PRESETS.get(pattern) or pattern), tail)
    return None if answer is None else normalise(answer)


def normalise(answer: str) -> str:
    """Equal numbers become equal texts (`1,200.50` -> `1200.5`, `4/2` -> `2`); other texts lose outer blanks and `$`."""
    text = answer.strip().strip("$").strip().rstrip(".,").strip()
    plain = text.replace(",", "").removeprefix("+").replace("\\%", "").removesuffix("%")
    # Digits of other scripts stay as they are: a zero among them would be a division by it.
    if not regex.fullmatch(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[0-9]+/0*[1-9][0-9]*)", plain):
        return text
    value = Fraction(plain)
    if "/" in plain or value.denominator == 1:
        return str(value)
    whole, _, digits = plain.partition(".")
    sign = "-" if value < 0 else ""
    return f"{sign}{int(whole.lstrip('-') or 0)}.{digits.rstrip('0')}"


@functools.lru_cache(maxsize=MAX_COMPILED)
def _compile(pattern: str) -> Any:
    if pattern not in PRESETS.values():
        _check_size(pattern)
    try:
        compiled = regex.compile(pattern, cache_pattern=False)
    except (regex.error, ValueError, OverflowError) as error:
        raise _refused(pattern, f"it does not compile ({error})") from None
    if compiled.groups != 1:
        remedy = "write (?:...) for all but one" if compiled.groups else "put the answer into one, (...)"
        raise _refused(pattern, f"it has {compiled.groups} groups, so {remedy}")
    return compiled


def _refused(pattern: str, reason: str) -> ValueError:
    rule = f"one of {', '.join(PRESETS)} or a regular expression with one group"
    return wrong("answer_pattern", rule, pattern, " ".join(reason.split()))


# The tokens of an expression, tried in this order. What is no token is a character that stands for itself.
_TOKENS = regex.compile(
    r"""
    (?P<escape> \\. )
    | (?P<set> \[ \^? \]? (?: \\. | [^\]\[\\] )* \] )
    | (?P<open> \( (?: \?: | \?= | \?! | \?<= | \?<! | \?> | \?P?<[A-Za-z_][A-Za-z0-9_]*> | \?[aiLmsu]+: | (?![?*]) ) )
    | (?P<flags> \(\?[aiLmsu]+\) )
    | (?P<close> \) )
    | (?P<repeat> [*+?] | \{ (?P<least>[0-9]*) (?P<comma>,?) (?P<most>[0-9]*) (?<! \{ ) \} )
    | (?P<fuzzy> \{ [0-9 <=+,]* [dies] (?![A-Za-z]) )
    | (?P<unknown> [\[(] )
    """,
    regex.VERBOSE | regex.DOTALL,
)


def _check_size(pattern: str) -> None:
    """Add up what the expression holds with every repetition written out.

    A repetition counts at least twice: the compiled form of nested ones doubles with each.

    Raises:
        ValueError: it is too large or too deep, or holds what this reader does not know.
    """
    sizes = [0]  # of the groups that are open here, the outermost first
    last = 0  # size of what a repetition at this place would repeat
    place = 0
    while place < len(pattern):
        token = _TOKENS.match(pattern, place)
        kind = token.lastgroup if token is not None else "character"
        place = token.end() if token is not None else place + 1
        if token is not None and token["repeat"]:
            added, last = last * (_count(token) - 1), last * _count(token)
        elif kind == "open":
            added = last = 0
            sizes.append(1)
        elif kind == "close" and len(sizes) > 1:
            added = last = sizes.pop()
        elif kind in ("close", "fuzzy", "unknown"):
            raise _refused(pattern, _REMEDIES[kind])
        else:
            added, last = (0, last) if kind == "flags" else (1, 1)
        sizes[-1] += added
        if len(sizes) > MAX_NESTING or sizes[-1] > MAX_EXPANDED:
            limit = f"{MAX_NESTING} nested groups and {MAX_EXPANDED} characters with its repetitions written out"
            raise _refused(pattern, f"it has more than {limit}, so write a smaller one")
    if len(sizes) > 1:
        raise _refused(pattern, "a group is not closed; write \\( for the character itself")


_REMEDIES = {
    "close": "a group is closed that was not opened; write \\) for the character itself",
    "fuzzy": "approximate matching is not offered; write \\{ for a brace",
    "unknown": "it has a kind of group or set that is not offered; write \\( or \\[ for the character itself",
}


def _count(repeat: Any) -> int:
    """How many times the repetition asks for, at least 2; without an upper limit, its lower one."""
    counts = [int(text) for text in (repeat["least"], repeat["most"]) if text]
    return max([2, *counts])


def _last_match(compiled: Any, text: str) -> str | None:
    answer: str | None = None
    try:
        for match in compiled.finditer(text, timeout=SEARCH_TIMEOUT_S):
            if match.group(1) is not None:
                answer = match.group(1)
    except TimeoutError:
        return None
    return answer


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
