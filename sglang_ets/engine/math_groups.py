"""Which answers are equal in value: `python -m sglang_ets.engine.math_groups`, the process that `voting` asks.

One JSON line in, a list of answers; one JSON line out, a label for each. It is a process of its own because sympy can take
any time and any memory over a few characters (`9^{9^{9^9}}`): math-verify's own limits need the main thread, and whatever
they do not stop, the asker kills.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Sequence
from typing import Any

READY = "ready"
ONE_ANSWER_S = 1  # math-verify's limit on parsing one answer and on comparing two
MAX_MEMORY_BYTES = 4 << 30


def labels_of(answers: Sequence[str]) -> list[int]:
    """Label of each answer: the index of the first one that it equals in value."""
    from math_verify import parse, verify  # type: ignore[import-untyped,unused-ignore]

    parsed = [parse(f"\\boxed{{{answer}}}", parsing_timeout=ONE_ANSWER_S) for answer in answers]
    labels: list[int] = []
    firsts: list[int] = []
    for index, value in enumerate(parsed):
        label = next((first for first in firsts if _are_equal(verify, parsed[first], value)), index)
        if label == index:
            firsts.append(index)
        labels.append(label)
    return labels


def _are_equal(verify: Any, one: Any, other: Any) -> bool:
    try:
        return bool(verify(one, other, timeout_seconds=ONE_ANSWER_S))
    except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError, MemoryError):
        return False  # what sympy cannot compare is not known to be equal


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    labels_of(["1"])  # import before the first question, so that its time limit is for the question alone
    logging.disable(logging.CRITICAL)  # math-verify warns about each answer that is no mathematics
    print(json.dumps(READY), flush=True)
    for line in sys.stdin:
        print(json.dumps(labels_of(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
