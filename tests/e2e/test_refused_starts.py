"""Command lines with which no server starts: one sentence, before weights are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import TWO_PROCESSES

pytestmark = pytest.mark.server

LIMIT_S = 300
DETERMINISTIC = ["--enable-deterministic-inference", "--attention-backend", "flashinfer"]
# What is given, and what the sentence says.
REFUSED: dict[str, tuple[list[str], str]] = {
    "no radix cache": (["--disable-radix-cache"], "--attention-backend triton or fa3"),
    "none by determinism": (DETERMINISTIC, "--attention-backend triton or fa3"),
    "shared weights on one rank of two": (
        ["--tp", "2", "--prm-format", "confidence", "--prm-tp", "1"],
        "--prm-tp 1 needs a --prm-model-path of its own",
    ),
}
# A process for each command line, forked where the launcher's imports, which take longest, are done.
STARTS = """
import gc, json, os, signal, sys
gc.disable()
from sglang_ets import launch_server
import sglang.srt.entrypoints.http_server
gc.freeze()
for place, flags in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        with open(f"{place}.txt", "wb") as out:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
        signal.alarm(60)  # one that serves after all
        sys.argv[1:] = flags
        launch_server.main()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """How each process ended, and what it has said."""
    folder = tmp_path_factory.mktemp("refused")
    command = [sys.executable, "-c", STARTS, json.dumps([flags for flags, _ in REFUSED.values()])]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **TWO_PROCESSES}, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    codes = [int(line) for line in done.stdout.split()]
    said = [Path(folder, f"{place}.txt").read_text(encoding="utf-8", errors="replace") for place in range(len(codes))]
    return dict(zip(REFUSED, zip(codes, said, strict=True), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_weights_load(started: dict[str, tuple[int, str]], name: str) -> None:
    code, said = started[name]
    assert code == 1
    assert REFUSED[name][1] in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert "Load weight" not in said
