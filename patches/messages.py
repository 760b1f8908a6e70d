"""What a process says when the installed sglang is not the code that the patches were written for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from sglang_ets.flags import ALLOW_UNTESTED


class PatchDrift(SystemExit):
    """The installed sglang cannot be patched. Ends the process: sglang's plugin loader swallows `Exception`."""


def broken_message(breaks: Sequence[str]) -> str:
    unique = list(dict.fromkeys(breaks))  # several hooks may rely on one thing
    return (
        f"sglang-ets: search cannot work with sglang {version('sglang')}, which breaks {_count(unique, 'contract')}:\n"
        f"{_lines(unique)}\n"
        "  What to do: install the sglang version named in setup.py. docs/patches.md says how to move to another."
    )


def untested_message(targets: Sequence[str]) -> str:
    unique = list(dict.fromkeys(targets))
    return (
        f"sglang-ets: sglang {version('sglang')} was not tested: {_count(unique, 'target')} of our patches changed, "
        f"though every contract holds:\n{_lines(unique)}\n"
        f"  What to do: install the sglang version named in setup.py, or start with --{ALLOW_UNTESTED.name} "
        f"({ALLOW_UNTESTED.env}=1) to be warned and not stopped."
    )


def untested_warning(targets: Sequence[str]) -> str:
    unique = list(dict.fromkeys(targets))
    return (
        f"sglang-ets: sglang {version('sglang')} was not tested; every contract of our patches holds, but the code changed "
        f"at {', '.join(unique)}"
    )


def _count(items: Sequence[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _lines(items: Sequence[str]) -> str:
    return "\n".join(f"    {item}" for item in items)
