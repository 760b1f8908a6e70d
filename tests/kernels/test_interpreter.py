"""Runs the kernel tests a second time, in a process whose Triton kernels are interpreted on the CPU.

TRITON_INTERPRET has to be set before triton is imported, hence the process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
KERNELS = ("step_pool", "step_score", "pairwise_cosine", "tree_attention")
FILES = (
    *(f"kernels/test_{name}.py" for name in KERNELS),
    "engine/test_tree_attention.py",
    "engine/test_tree_attention_model.py",
    "bench/test_gpu_decode.py",
)
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def interpreted() -> str:
    """What pytest prints: one process for all files, most of whose time would else go into imports."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rs",
        "-p",
        "no:cacheprovider",
        *(str(TESTS / file) for file in FILES),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("file", FILES)
def test_kernel_in_the_interpreter(interpreted: str, file: str) -> None:
    assert re.search(rf"^tests/{re.escape(file)}::.* PASSED", interpreted, re.MULTILINE), interpreted
    assert "skipped" not in interpreted.splitlines()[-1], interpreted
