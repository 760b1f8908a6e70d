"""Time of calls."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any


def timed(run: Callable[[], Any], clock_s: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    """What a call returns, and its milliseconds by this clock."""
    started = clock_s()
    result = run()
    return result, 1e3 * (clock_s() - started)


def processor_s() -> float:
    """Seconds that this process and its children that have ended computed so far: a busy machine adds nothing to them."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_turns(sides: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of each side, one call of each after the other."""
    rounds = [[timed(run)[1] for run in sides.values()] for _ in range(repetitions)]
    return {name: [one[place] for one in rounds] for place, name in enumerate(sides)}
