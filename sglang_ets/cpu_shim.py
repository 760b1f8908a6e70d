"""Puts a stand-in for `sgl_kernel` in place where the wheel that sglang requires cannot load: machines without CUDA.

The stand-in is a package in a folder of its own. The folder goes to the front of `sys.path`, which multiprocessing
hands to spawned children before they import anything, so schedulers find it too, whatever started them: our
launcher, `sgl.Engine` or a test.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

NAME = "sgl_kernel"
FOLDER = str(Path(__file__).parent / "stand_in")


def install() -> bool:
    """Make `import sgl_kernel` work. Returns whether the stand-in is used.

    Idempotent. Must run before sglang's engine modules are imported. On a machine without CUDA it also tells sglang to
    use its CPU engine.
    """
    if FOLDER in sys.path:
        return True
    if torch.cuda.is_available():
        return False
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    try:
        importlib.import_module(NAME)
    except (ImportError, OSError, RuntimeError):
        _forget_partial_import()
        sys.path.insert(0, FOLDER)
        return True
    return False


def _forget_partial_import() -> None:
    for name in [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]:
        del sys.modules[name]


def is_cpu_asked_for(argv: Sequence[str]) -> bool:
    """Whether the command line or the environment asks for the CPU on a machine that may have a GPU."""
    pairs = itertools.pairwise((*argv, ""))
    by_flag = any(item == "--device=cpu" or (item, value) == ("--device", "cpu") for item, value in pairs)
    return by_flag or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
