"""Time of calls, by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its milliseconds."""
    started = time.perf_counter()
    result = run()
    return result, 1e3 * (time.perf_counter() - started)


def in_turns(sides: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of each side, one call of each after the other."""
    rounds = [[timed(run)[1] for run in sides.values()] for _ in range(repetitions)]
    return {name: [one[place] for one in rounds] for place, name in enumerate(sides)}
