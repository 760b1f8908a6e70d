"""Stand-in for `sgl_kernel` beside a torch that its wheel was not built for: everything can be imported, nothing is called.

`SGLANG_FORCE_FUSED_OP_BACKEND=torch` keeps sglang from calling it. `scalar_type.py` is the wheel's own, put here by prepare.py.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class Missing:
    """A kernel of the wheel: importable, not callable."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{self._name} is not on this machine; choose a backend of sglang that does without it"
        )


class Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every submodule that has no file."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        is_ours = (
            fullname.startswith(f"{__name__}.") and importlib.machinery.PathFinder.find_spec(fullname, path) is None
        )
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_ours else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: _missing(module.__name__, name)  # type: ignore[method-assign]
        if module.__name__ == f"{__name__}.utils":
            module.is_arch_support_pdl = lambda: False  # type: ignore[attr-defined]


def _missing(module: str, name: str) -> Missing:
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(f"{module}.{name}")


def __getattr__(name: str) -> Missing:
    return _missing(__name__, name)


sys.meta_path.insert(0, Submodules())
