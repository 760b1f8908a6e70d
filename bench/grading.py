"""Is an answer right? Exactly (embedded task), or by mathematical equality (math-verify) in worker processes.

math-verify guards itself with signals, which work in a main thread only; here its own limits are off, and a worker that takes
too long is killed and replaced. An answer that cannot be graded in time is wrong, and counted in `timeouts`.
"""

from __future__ import annotations

import multiprocessing
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import Literal

from sglang_ets.core.patterns import normalise

Method = Literal["exact", "math"]

TIMEOUT_S = 5.0
START_TIMEOUT_S = 120.0  # a worker imports sympy first
MAX_ANSWER_CHARS = 1000  # nobody's final answer; sympy's time grows much faster than the text
_BLANKS = re.compile(r"\s+|\\[,;:! ]|\\(?:left|right|displaystyle)\b")
_UNITS = re.compile(r"\\(?:text|mathrm|mbox)\{\s*([^{}]*)\}")
_READY = "ready"


@dataclass(frozen=True)
class Grade:
    """Of one answer. `strict` is None unless it was asked for."""

    is_right: bool
    strict: bool | None = None
    timed_out: bool = False


def exact(answer: str | None, truth: str) -> bool:
    """Equal after normalising numbers (`1,200.0` equals `1200`)."""
    return answer is not None and normalise(answer) == normalise(truth)


def strict(answer: str | None, truth: str) -> bool:
    """The second grader: equal texts once blanks, text commands and ways to write a fraction are made uniform.

    It never calls different things equal that look different, so it marks `1/2` against `0.5` wrong.
    """
    return answer is not None and _plain(answer) == _plain(truth)


def _plain(text: str) -> str:
    plain = _BLANKS.sub("", _UNITS.sub(r"\1", text.strip().strip("$")))
    plain = plain.replace("dfrac", "frac").replace("tfrac", "frac").replace("^{\\circ}", "").replace("^\\circ", "")
    plain = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", plain)
    return normalise(plain.replace("\\%", "").replace("\\$", ""))


class Grader:
    """Grades on `num_workers` processes; safe to call from several threads. Use it as a context manager.

    Raises:
        ValueError: a limit is not positive.
    """

    def __init__(self, method: Method = "math", *, num_workers: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(f"num_workers and timeout_s must be positive, got {num_workers} and {timeout_s}")
        self.method = method
        self.timeout_s = timeout_s
        self.timeouts = 0
        self._lock = threading.Lock()
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        self._workers = [_Worker() for _ in range(num_workers if method == "math" else 0)]
        for worker in self._workers:
            self._free.put(worker)

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()

    def grade(self, answer: str | None, truth: str, *, also_strict: bool = False) -> Grade:
        """One answer against the truth."""
        second = strict(answer, truth) if also_strict else None
        if answer is None or self.method == "exact" or exact(answer, truth):
            return Grade(exact(answer, truth), second)
        if len(answer) > MAX_ANSWER_CHARS:
            return Grade(False, second)
        worker = self._free.get()
        try:
            verdict = worker.ask(truth, answer, self.timeout_s)
        finally:
            self._free.put(worker)
        if verdict is None:
            with self._lock:
                self.timeouts += 1
        return Grade(bool(verdict), second, verdict is None)


def disagreement(grades: Iterable[Grade]) -> float:
    """Share of answers, 0..1, on which the two graders differ.

    Raises:
        ValueError: no grade has a strict one.
    """
    both = [grade for grade in grades if grade.strict is not None]
    if not both:
        raise ValueError("disagreement needs grades with also_strict=True, got none; ask for the strict grade too")
    return sum(grade.is_right != grade.strict for grade in both) / len(both)


def majority(answers: Sequence[str | None]) -> str | None:
    """The commonest normalised answer, the first of equals; None where nobody answered."""
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            votes[normalise(answer)] = votes.get(normalise(answer), 0) + 1
    return max(votes, key=lambda answer: votes[answer]) if votes else None


class _Worker:
    """One process that grades; killed and started again when an answer takes too long."""

    def __init__(self) -> None:
        # spawn: a fork would copy the locks of the caller's threads
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False

    def ask(self, truth: str, answer: str, timeout_s: float) -> bool | None:
        """None: no verdict in time, or the process died over it."""
        try:
            if not self._is_ready:
                if not self._pipe.poll(START_TIMEOUT_S):
                    raise RuntimeError(f"a grading process must start in {START_TIMEOUT_S:g} s; it did not")
                self._pipe.recv()
                self._is_ready = True
            self._pipe.send((truth, answer))
            if self._pipe.poll(timeout_s):
                return bool(self._pipe.recv())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # it ran out of memory, or recursed too deep for C: as good as no verdict
        self.stop()
        self._start()
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    import logging

    from math_verify import parse, verify  # type: ignore[import-untyped,unused-ignore]

    logging.disable(logging.CRITICAL)  # one line of warnings for each answer that is no mathematics
    pipe.send(_READY)
    while True:
        try:
            truth, answer = pipe.recv()
        except EOFError:
            return
        try:
            sides = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (truth, answer)]
            pipe.send(bool(verify(*sides, timeout_seconds=None)))
        except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError, MemoryError):
            pipe.send(False)  # what sympy cannot read equals nothing
