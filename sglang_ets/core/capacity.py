"""Which searches run at the same time: as many as the KV pools are expected to hold, in order of priority and age.

A search multiplies one request by hundreds, so searches that run together until the pool is full make each other compute
everything again. Here a search starts when its expected peak fits beside those of the searches that run; what cannot start
waits in a bounded queue. An estimate may be wrong: then the youngest running search gives way (`SearchQueue.suspend`) and
goes on when there is room again. Pure: ids and numbers, no engine and no clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace

from sglang_ets.core.config import SearchConfig

KEPT_OBSERVATIONS = 32  # per algorithm; older ones say little about today's prompts
CAUTIOUS_QUANTILE = 0.75  # of the observed peaks
UNSEEN_STEPS = 4  # steps of full length that a trajectory is expected to hold before any search was seen


@dataclass(frozen=True)
class Need:
    """Tokens of KV in the two pools."""

    policy_tokens: int
    prm_tokens: int

    def __add__(self, other: Need) -> Need:
        return Need(self.policy_tokens + other.policy_tokens, self.prm_tokens + other.prm_tokens)

    def fits(self, pools: Need) -> bool:
        return self.policy_tokens <= pools.policy_tokens and self.prm_tokens <= pools.prm_tokens

    def at_least(self, other: Need) -> Need:
        """The larger of both, pool by pool."""
        return Need(max(self.policy_tokens, other.policy_tokens), max(self.prm_tokens, other.prm_tokens))


class NeedEstimates:
    """Expected peaks of searches, learned from the peaks of those that ended: tokens beyond the prompt for each trajectory."""

    def __init__(self) -> None:
        self._peaks: dict[str, deque[tuple[float, float]]] = {}

    def observe(self, config: SearchConfig, prompt: Need, peak: Need) -> None:
        """A search has ended whose peak in each pool was this."""
        grown = (
            max(0, peak.policy_tokens - prompt.policy_tokens) / config.width,
            max(0, peak.prm_tokens - prompt.prm_tokens) / config.width,
        )
        self._peaks.setdefault(config.algorithm, deque(maxlen=KEPT_OBSERVATIONS)).append(grown)

    def estimate(self, config: SearchConfig, prompt: Need) -> Need:
        """The expected peak of a search. Before its algorithm was seen, as if its trajectories shared nothing."""
        peaks = self._peaks.get(config.algorithm)
        if peaks:
            policy, prm = (_quantile([peak[pool] for peak in peaks]) for pool in (0, 1))
        else:
            policy = prm = float(min(config.max_tokens, UNSEEN_STEPS * config.max_step_tokens))
        return prompt + Need(math.ceil(policy * config.width), math.ceil(prm * config.width))


def _quantile(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(CAUTIOUS_QUANTILE * len(ordered)))]


@dataclass(frozen=True)
class _Place:
    """A search in the queue. The smaller `rank` goes first: higher priority, then earlier arrival."""

    rank: tuple[int, int]
    need: Need
    waits_for_end: int = 0  # it goes on once so many searches that ran have ended: there is no more room before


@dataclass
class SearchQueue:
    """Who runs and who waits. `pools` are the sizes of the two KV pools, less what ordinary requests are to keep."""

    pools: Need
    max_waiting: int
    max_running: int | None = None
    _running: dict[str, _Place] = field(default_factory=dict)
    _suspended: dict[str, _Place] = field(default_factory=dict)
    _waiting: dict[str, _Place] = field(default_factory=dict)
    _num_arrived: int = 0
    _num_ended: int = 0  # that ran

    def enter(self, search_id: str, need: Need, priority: int = 0) -> bool:
        """A search has arrived. Returns False, and forgets it, if the bound of waiting searches is reached."""
        self._num_arrived += 1
        place = _Place((-priority, self._num_arrived), need)
        if len(self._waiting) >= self.max_waiting and not self._may_run(place, self._waiting):
            return False
        self._waiting[search_id] = place
        return True

    def update(self, search_id: str, held: Need) -> None:
        """A running search holds this much now: it needs at least as much."""
        place = self._running.get(search_id)
        if place is not None:
            self._running[search_id] = replace(place, need=place.need.at_least(held))

    def start(self) -> list[str]:
        """The searches that begin, or go on, now; they count as running from here. Suspended ones go first."""
        started: list[str] = []
        for queue in (self._suspended, self._waiting):
            for search_id, place in sorted(queue.items(), key=lambda item: item[1].rank):
                if not self._may_run(place, {}):
                    return started  # in order: a small search does not overtake a large one for ever
                del queue[search_id]
                self._running[search_id] = place
                started.append(search_id)
        return started

    def suspend(self) -> str | None:
        """The running search that gives way, the last in order, until another has ended; None if a single one runs."""
        if len(self._running) < 2:
            return None
        search_id = max(self._running, key=lambda name: self._running[name].rank)
        self._suspended[search_id] = replace(self._running.pop(search_id), waits_for_end=self._num_ended + 1)
        return search_id

    def leave(self, search_id: str) -> None:
        """A search has ended. Idempotent."""
        self._num_ended += search_id in self._running
        for queue in (self._running, self._suspended, self._waiting):
            queue.pop(search_id, None)

    @property
    def running(self) -> list[str]:
        """In order: the first one goes first for everything."""
        return sorted(self._running, key=lambda search_id: self._running[search_id].rank)

    @property
    def num_suspended(self) -> int:
        return len(self._suspended)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _may_run(self, place: _Place, before: dict[str, _Place]) -> bool:
        """Whether a search fits beside the running ones and those that go before it; the first always does."""
        if before or (self.max_running is not None and len(self._running) >= self.max_running):
            return False
        if self._running and place.waits_for_end > self._num_ended:
            return False
        total = place.need
        for running in self._running.values():
            total += running.need
        return not self._running or total.fits(self.pools)
