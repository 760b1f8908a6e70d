"""PRM-guided tree search inside the SGLang scheduler.

`sglang_ets.Engine` searches without a server; importing it loads sglang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_ets.offline import Engine, SearchFailed, SearchResult

__all__ = ["Engine", "SearchFailed", "SearchResult"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sglang_ets' has no attribute {name!r}")
    from sglang_ets import offline

    return getattr(offline, name)
