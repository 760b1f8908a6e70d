"""Which answers are equal in value: math-verify in a process of its own, with a limit on its time and its memory.

sympy can take any time and any memory over a few characters (`9^{9^{9^9}}`). math-verify's own limits on one comparison need
a main thread, which a child process has; whatever they do not stop, the asker kills. `python -m sglang_ets.math_process` is
the child: one JSON line in, a list of answers; one JSON line out, a label for each.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

READY = "ready"
START_LIMIT_S = 60.0  # sympy's import
ONE_ANSWER_S = 1  # math-verify's limit on parsing one answer and on comparing two
MAX_MEMORY_BYTES = 4 << 30
_CHUNK_BYTES = 1 << 16


class MathProcess:
    """The child: started at the first question, killed when it takes too long. For one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answers: Sequence[str], limit_s: float) -> list[int] | None:
        """A label for each answer; equal labels mean equal values. None: no reply in time, or the process died."""
        try:
            process = self._running()
            assert process.stdin is not None
            process.stdin.write(json.dumps(list(answers)).encode() + b"\n")
            process.stdin.flush()
            return list(json.loads(_line(process, limit_s)))
        except (TimeoutError, OSError, ValueError):  # ValueError: half a line of a process that died
            self.stop()
            return None

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._process is None:
            # Not multiprocessing: a scheduler is a daemon process there and may have no children.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang_ets.math_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            if json.loads(_line(self._process, START_LIMIT_S)) != READY:
                raise ValueError("the process must first say that it is ready")
        return self._process


def _line(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """The next line of its output.

    Raises:
        TimeoutError: it does not come in time.
        OSError: the process has ended.
    """
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    line, end = b"", time.monotonic() + limit_s
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no answer in {limit_s:g} s")
        piece = os.read(pipe, _CHUNK_BYTES)
        if not piece:
            raise OSError("the process that compares answers has ended")
        line += piece
    return line


def labels_of(answers: Sequence[str]) -> list[int]:
    """Label of each answer: the index of the first one that it equals in value. In this process: without any limit."""
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
