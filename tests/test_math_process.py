"""The cage of math-verify: its limits on time and memory, and that it serves on after what it could not stop."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from sglang_ets import math_process
from sglang_ets.math_process import MathProcess

LONG_S = 60.0


@pytest.fixture(scope="module")
def process() -> Iterator[MathProcess]:
    made = MathProcess()
    yield made
    made.stop()


def child_of(process: MathProcess) -> Any:
    assert process._process is not None
    return process._process


def test_labels_say_which_answers_are_equal(process: MathProcess) -> None:
    assert process.ask(["0.5", "x+1", r"\frac12", "1+x", "no mathematics"], LONG_S) == [0, 1, 0, 1, 4]


def test_a_comparison_that_hangs_is_killed_and_the_next_question_answered(process: MathProcess) -> None:
    process.ask(["1", "2"], LONG_S)
    child = child_of(process)
    child.send_signal(signal.SIGSTOP)  # as slow as can be, however busy the machine
    assert process.ask(["0.5", "1/2"], 0.05) is None
    assert child.returncode == -signal.SIGKILL
    assert process.ask(["0.5", "1/2"], LONG_S) == [0, 0]


def test_one_hostile_answer_does_not_keep_the_others_from_being_compared(process: MathProcess) -> None:
    first, hostile, last = process.ask(["0.5", "9^{9^{9^{9^9}}}", "1/2"], LONG_S) or [0, 0, 0]
    assert first == last != hostile


def test_a_process_that_died_is_replaced(process: MathProcess) -> None:
    process.ask(["1", "2"], LONG_S)
    child_of(process).kill()
    child_of(process).wait()
    assert process.ask(["0.5", "1/2"], LONG_S) == [0, 0]


def test_the_child_has_a_limit_on_its_memory(process: MathProcess) -> None:
    process.ask(["1", "2"], LONG_S)
    limits = psutil.Process(child_of(process).pid).rlimit(psutil.RLIMIT_AS)
    assert limits == (math_process.MAX_MEMORY_BYTES, math_process.MAX_MEMORY_BYTES)


def test_a_child_that_does_not_start_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    popen, made = subprocess.Popen, MathProcess()
    monkeypatch.setattr(subprocess, "Popen", lambda _command, **options: popen(["sleep", "600"], **options))
    monkeypatch.setattr(math_process, "START_LIMIT_S", 0.05)
    before = set(psutil.Process(os.getpid()).children())
    assert made.ask(["1", "2"], LONG_S) is None
    assert not set(psutil.Process(os.getpid()).children()) - before
