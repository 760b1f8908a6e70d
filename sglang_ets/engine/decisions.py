"""What comes from a clock, a solver or another process and decides something: taken in once per tick, the same on every rank.

With tensor parallelism each rank runs every search. Only the first one starts solvers, compares answers and looks at the clock;
before each tick the others hear what it has, so that no rank decides by its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

from sglang_ets.engine.live import Kind, LiveSearch
from sglang_ets.prm.ranks import Ranks

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.002  # with nothing to decode, the loop sleeps this long at most for a result

# Of one search, what all ranks must have alike: its nodes, its requests in the engine, what it waits for.
State = tuple[int, int, str]


class RanksDiffer(RuntimeError):
    """A bug, or a fault on one rank alone: the ranks no longer run the same searches."""


@dataclass(frozen=True)
class Failed:
    """The work behind a decision raised; one sentence."""

    message: str


@dataclass(frozen=True)
class Decision:
    """Something that a search takes in: a Selection, the ranked answers, a Forecast, or that its time is up."""

    place: int  # of the search among the live ones, oldest first
    kind: Kind | Literal["deadline"]
    value: Any = None


class Decisions:
    """Starts the work behind decisions, and tells what is due. Owned by the coordinator; scheduler thread only."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._workers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sglang-ets")

    def in_loop(self, is_cheap: bool) -> bool:
        """Whether this selection may be made at once, on the loop: its policy is cheap, and no other rank waits for it."""
        return self._ranks.is_alone and is_cheap

    def select(self, live: LiveSearch, choose: Callable[[], Any]) -> None:
        """Let a worker thread choose; the search waits for it."""
        self.forget(live)
        live.awaited = ("select", self._workers.submit(choose) if self._ranks.is_first else None)

    def guess(self, live: LiveSearch, choose: Callable[[], Any]) -> None:
        """Let a worker thread choose as `select` would; the search goes on, and forgets it once it waits for more."""
        live.awaited = ("guess", self._workers.submit(choose) if self._ranks.is_first else None)

    def answer(self, live: LiveSearch, rank: Callable[[], Future[Any]]) -> None:
        """Start what ranks the answers; the search waits for it."""
        self.forget(live)
        live.awaited = ("answer", rank() if self._ranks.is_first else None)

    def forget(self, live: LiveSearch) -> None:
        """The search waits for nothing: what has not begun is not begun, so that nobody waits behind it."""
        if live.awaited is not None and live.awaited[1] is not None:
            live.awaited[1].cancel()
        live.awaited = None

    def wait_for_one(self, searches: Sequence[LiveSearch]) -> None:
        """With nothing else to do, let the worker thread have the interpreter instead of spinning. On the first rank only: the
        others wait for it anyway."""
        futures = [future for live in searches if live.awaited is not None and (future := live.awaited[1]) is not None]
        if futures:
            wait(futures, timeout=IDLE_WAIT_S, return_when=FIRST_COMPLETED)

    def due(self, searches: Sequence[LiveSearch]) -> list[tuple[LiveSearch, Decision]]:
        """What these searches, all that live, take in now. With several ranks a collective call.

        Raises:
            RanksDiffer: this rank does not run what the first one runs.
        """
        if not any(live.awaited is not None or live.deadline_s is not None for live in searches):
            return []
        state = tuple(_state(live) for live in searches)
        own = _decisions(searches) if self._ranks.is_first else []
        first, decisions = self._ranks.from_first((state, own))
        if first != state:
            raise RanksDiffer(f"this rank runs searches in the states {state}, expected {first} as on the first rank")
        return [(searches[decision.place], decision) for decision in decisions]


def _state(live: LiveSearch) -> State:
    awaited = "" if live.awaited is None else live.awaited[0]
    return len(live.search.tree.nodes), len(live.children) + len(live.guesses.children), awaited


def _decisions(searches: Sequence[LiveSearch]) -> list[Decision]:
    now_s = time.monotonic()
    made = []
    for place, live in enumerate(searches):
        if live.awaited is not None and live.awaited[1] is not None and live.awaited[1].done():
            made.append(Decision(place, live.awaited[0], _outcome(live, live.awaited[1])))
        if live.deadline_s is not None and now_s - live.started_s >= live.deadline_s:
            made.append(Decision(place, "deadline"))
    return made


def _outcome(live: LiveSearch, future: Future[Any]) -> Any:
    error = future.exception()
    if error is None:
        return future.result()
    logger.error("search %s failed", live.rid, exc_info=error)
    return Failed(f"{type(error).__name__}: {error}")
