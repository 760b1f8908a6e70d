"""The end of a search, off the scheduler loop: ranks the trajectories, with votes joined by the value of their answers.

`1/2`, `0.5` and `\\frac{1}{2}` are three texts and one vote. Integers are equal as texts already, so a search whose answers
are all integers asks nobody.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import regex

from sglang_ets.core.answer import RankedAnswer, Trajectory, rank
from sglang_ets.core.config import SearchConfig
from sglang_ets.engine.math_groups import READY

logger = logging.getLogger(__name__)

START_LIMIT_S = 60.0  # sympy's import
ASK_LIMIT_S = 5.0  # all answers of one search; then their texts decide
MAX_ANSWER_CHARS = 300  # a longer one is compared as text
_CHUNK_BYTES = 1 << 16


class Voting:
    """Ranks on a thread of its own, so that a slow comparison holds up neither the loop nor another search's selection."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sglang-ets-answer")
        self._process = MathProcess()

    def submit(
        self, trajectories: Sequence[Trajectory], config: SearchConfig, num_ranks: int = 1
    ) -> Future[list[RankedAnswer]]:
        """Ranked answers, best first: see `answer.rank`.

        With several tensor-parallel ranks all must have the answer in the same tick: texts decide, at once.
        """
        if num_ranks > 1:
            done: Future[list[RankedAnswer]] = Future()
            done.set_result(rank(trajectories, config))
            return done
        same = self.labels if config.answer_equality == "math" else None
        return self._thread.submit(rank, trajectories, config, same)

    def labels(self, answers: Sequence[str]) -> list[int]:
        """A label for each of these different texts; equal labels mean equal values. Never fails: texts decide at worst."""
        labels = list(range(len(answers)))
        short = [i for i, answer in enumerate(answers) if len(answer) <= MAX_ANSWER_CHARS]
        if all(regex.fullmatch(r"-?\d+", answers[i]) for i in short):
            return labels
        by_value = self._process.ask([answers[i] for i in short], ASK_LIMIT_S)
        if by_value is None:
            logger.warning("answers were not compared in %g s; votes count equal texts instead", ASK_LIMIT_S)
            return labels
        for place, label in zip(short, by_value, strict=True):
            labels[place] = short[label]
        return labels


class MathProcess:
    """`math_groups` as a child process: started at the first question, killed when it takes too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answers: Sequence[str], limit_s: float) -> list[int] | None:
        """Labels, or None when none came in time or the process died."""
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
                [sys.executable, "-m", "sglang_ets.engine.math_groups"],
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
