"""Answers found in texts, and patterns that must not stall the server."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from sglang_ets.core import patterns
from sglang_ets.core.patterns import (
    MAX_EXPANDED,
    MAX_NESTING,
    MAX_PATTERN_CHARS,
    check_pattern,
    extract_answer,
    normalise,
)


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
    [
        ("1,200.50", "1200.5"),
        ("4/2", "2"),
        ("+7", "7"),
        ("50%", "50"),
        ("x+1", "x+1"),
        ("1/0", "1/0"),
        ("1/00", "1/00"),
        ("6/03", "2"),
        ("1/٠", "1/٠"),
    ],
)
def test_equal_numbers_become_equal_texts(text: str, plain: str) -> None:
    assert normalise(text) == plain


@pytest.mark.parametrize("pattern", ["(", "no group", "(two)(groups)"])
def test_a_pattern_needs_one_group(pattern: str) -> None:
    with pytest.raises(ValueError, match="one group"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i)final answer:\s*\$?([-+]?\d{1,3}(?:,\d{3})*(?:\.\d+)?)",
        r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}",
        r"boxed{([^}]+)}",
        r"<answer>(?P<answer>.*?)</answer>",
        r"(?<=####\s{0,3})(.+)$",
        r".{0,200}answer.{0,50}?(\d+(?>\.\d+)?)",
        r"[]\[()]*([A-E])(?![a-z])",
        r"(?s:.*)([^\n]++)",
        r"x{}(a{0})\p{Lu}*",
    ],
)
def test_patterns_that_people_write_are_accepted(pattern: str) -> None:
    check_pattern(pattern)


HOSTILE = {
    "one repetition": "((?:ab){1000000})",
    "a digit too many": "(a{99999999999999999999})",
    "leading zeros": "(a{000000000000000099999})",
    "nested repetitions": "(" + "(?:" * 40 + "a" + "){1,99}" * 40 + ")",
    "nested stars": "(" + "(?:" * 19 + "a" + ")*" * 19 + ")",
    "three times 99": "(" + "(?:" * 3 + "a" + "){1,99}" * 3 + ")",
    "open groups": "(" * 500,
    "deep": "(?:" * 124 + "(a)" + ")" * 124,
    "sets in sets": "[" * 490 + "(x)",
    "hidden by a comment": "(?#[)((?:a{1000}){1000})]",
    "hidden by a comment at the end": "(?x)#[\n((?:a{1000}){1000})#]",
    "hidden by a set": "((?:[[:alpha:])](?:a{1000}){1000}[[:alpha:](]){99})",
    "hidden by version 1": "(?V1)[[a]((?:a{1000}){1000})]",
    "after flags": "(b(?s){100000})",
    "approximate": "((?:abcdefghij){e<=9})",
    "approximate, in two": "((?:abc){2i+1d<=4})",
    "recursive": "((?R)|x)",
    "call": "(?P<a>(?&a))",
    "conditional": "(a)?(?(1)b|c)",
    "branch reset": "(?|(a)|(b))",
    "verbs": "(a(*PRUNE)(*SKIP)(*FAIL))",
    "named list": r"(\L<x>)",
    "bad name": r"(\N{BAD})",
    "flags that disagree": "(?a)(?u)(x)",
    "too long": "(" + "a" * MAX_PATTERN_CHARS + ")",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_patterns_are_refused_before_they_are_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compiling(pattern: str, **options: bool) -> object:
        compiled.append(pattern)
        return real(pattern, **options)

    real = regex.compile
    monkeypatch.setattr(patterns.regex, "compile", compiling)
    with pytest.raises(ValueError, match=r"^answer_pattern must be [^\n]*; [^\n]*$") as caught:
        check_pattern(HOSTILE[name])
    assert len(str(caught.value)) < 400
    assert not compiled or name in ("named list", "bad name", "flags that disagree")


def test_the_limits_are_what_they_say() -> None:
    check_pattern(f"(a{{{MAX_EXPANDED - 1}}})")
    with pytest.raises(ValueError, match="more than 20 nested groups and 5000 characters"):
        check_pattern(f"(a{{{MAX_EXPANDED}}})")
    nested = "(?:" * (MAX_NESTING - 2) + "(a)" + ")" * (MAX_NESTING - 2)
    check_pattern(nested)
    with pytest.raises(ValueError, match="more than 20 nested groups"):
        check_pattern(f"(?:{nested})")


PIECES = st.sampled_from(
    [
        "a",
        ".",
        "[a-z]",
        "[]a]",
        r"\w",
        r"\X",
        r"\p{L}",
        "|",
        "^",
        "(?i)",
        "{",
        "}",
        "é",
        "ß",
        r"\1",
        r"\x41",
        "[[:alpha:]]",
    ]
)
OPENERS = st.sampled_from(["(", "(?:", "(?=", "(?!", "(?<=", "(?>", "(?i:", "(?P<n>"])
REPEATS = st.sampled_from(
    ["", "", "*", "+?", "?", "{2}", "{3,}", "{,4}", "{1,99}", "{20}", "{500}", "{4000}", "{0}", "{ 3 }"]
)
PATTERNS = st.recursive(
    st.builds(str.__add__, PIECES, REPEATS),
    lambda inner: st.builds(
        lambda o, parts, r: f"{o}{''.join(parts)}){r}", OPENERS, st.lists(inner, max_size=4), REPEATS
    ),
    max_leaves=40,
).map(lambda inner: f"({inner})")


def test_what_is_accepted_compiles_in_little_time_and_memory() -> None:
    """In a process of its own, which may not take more; every pattern here would be kept at once."""
    hostile = [
        *HOSTILE.values(),
        *[f"((?:ab){{{n}}})" for n in (100, 1000, 2000)],
        r"(\X{4900})",
        "((?:(?:a{16}){16}){16})",
    ]
    hostile += [
        "(" + "(?:" * n + "a" + f"){r}" * n + ")" for n in range(1, 19) for r in ("*", "?", "{1,2}", "{2}", "{9}")
    ]
    code = (
        "import json, resource, sys\n"
        "from sglang_ets.core import patterns\n"
        "before = resource.getrusage(resource.RUSAGE_SELF)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "kept, refused = [], 0\n"
        "for pattern in json.load(sys.stdin):\n"
        "    try:\n"
        "        kept.append(patterns._compile.__wrapped__(pattern))\n"
        "    except ValueError:\n"
        "        refused += 1\n"
        "after = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([len(kept), refused, after.ru_maxrss - before.ru_maxrss, after.ru_utime - before.ru_utime]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(hostile), capture_output=True, text=True, check=True
    )
    kept, refused, grown_kib, seconds = json.loads(done.stdout)
    assert (kept > 20, refused > 40) == (True, True)
    assert grown_kib < 64 << 10
    assert seconds < 2


@given(PATTERNS)
def test_a_pattern_is_accepted_or_refused_in_one_sentence(pattern: str) -> None:
    message = ""
    try:
        check_pattern(pattern)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 400


def test_few_expressions_are_kept() -> None:
    for number in range(100):
        check_pattern(f"(a{number})")
    assert patterns._compile.cache_info().currsize == patterns.MAX_COMPILED
    assert not any("(a99)" in str(key) for key in sys.modules["regex._main"]._cache), (
        "the package's own cache keeps nothing of clients"
    )


def test_a_hostile_pattern_is_cut_off() -> None:
    started = time.perf_counter()
    assert extract_answer("a" * 2000 + "b", r"((?:a|aa)+)+$") is None
    assert time.perf_counter() - started < 2.0
