"""The pure core stays light: importing it loads no engine."""

from __future__ import annotations

import subprocess
import sys

LIGHT = [
    *(f"core.{name}" for name in ("settings", "config", "tree", "allocation", "clusters", "reduction", "ilp")),
    *(f"core.{name}" for name in ("selection", "search", "answer", "patterns", "attention_plan")),
    "wire",
    "engine.voting",
    "math_process",
    "tools.calibrate",
]


def test_core_loads_no_engine() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}: importlib.import_module('sglang_ets.' + name)\n"
        "print(sorted({'torch', 'sglang', 'triton', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
