"""Stand-in for `sgl_kernel` on machines without CUDA; `sglang_ets.cpu_shim` says when and why.

Every name can be imported, as sglang does at module level even on a CPU. None is called on the paths of a search.
"""

from __future__ import annotations

from typing import Any, NoReturn

__path__: list[str] = []  # no submodules


class _Missing:
    """A kernel that exists only on CUDA machines: importable, not callable."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{self._name} needs a CUDA device; this machine has none")


def __getattr__(name: str) -> _Missing:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name)
