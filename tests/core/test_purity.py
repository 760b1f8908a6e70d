"""The pure core stays light: importing it loads no engine."""

from __future__ import annotations

import subprocess
import sys

CORE = [
    "config",
    "tree",
    "allocation",
    "clusters",
    "reduction",
    "ilp",
    "selection",
    "search",
    "answer",
    "patterns",
    "voting",
    "math_groups",
    "calibrate",
]


def test_core_loads_no_engine() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {CORE!r}: importlib.import_module('sglang_ets.' + name)\n"
        "print(sorted({'torch', 'sglang', 'triton', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
