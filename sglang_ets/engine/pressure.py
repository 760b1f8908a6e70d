"""The pressure valve: searches give up locks when their locks are what keeps the engine from going on.

A trajectory is defined by its tokens, so giving up its lock is always safe: the KV is computed again when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_ets.engine.children import ChildReq
from sglang_ets.engine.live import LiveSearch

STUCK_TICKS = 3  # ticks in which requests wait and nothing runs before locks are given up
HOPELESS_TICKS = 200  # the same with no lock left to give up: the youngest search is failed
KEPT_WAITING_TICKS = 20  # in which an ordinary request does not enter before a search gives way to it
RELEASED_SHARE = 16  # a release frees this part of the pool, so that the next one is not due at once
DECODE_HEADROOM_TOKENS = 2  # per running request: what the next two ticks may need


@dataclass(frozen=True)
class Release:
    """This search gives up locks, those of its least promising trajectories first, until so many tokens can be evicted."""

    live: LiveSearch
    tokens: int


@dataclass(frozen=True)
class GiveUp:
    """This search fails, so that the others can go on."""

    live: LiveSearch
    message: str


@dataclass(frozen=True)
class Suspend:
    """The youngest running search waits until there is room again."""


class PressureValve:
    """Watches the plans of one scheduler. Decides, and changes nothing."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._stuck_ticks = 0
        self._kept_waiting_ticks = 0

    def decide(
        self, plan: Any, running: Sequence[LiveSearch], others: Sequence[LiveSearch]
    ) -> Release | Suspend | GiveUp | None:
        """What must happen after this plan if nothing runs, decoding is about to starve, or ordinary requests wait too long.

        `running`: the searches that may run, in order; `others`: those that wait or have ended, whose locks go first.
        """
        if not (self._stands_still(plan) or self._starves(plan) or self._keeps_waiting(plan)):
            return None
        decision = self._relief(running, others)
        if decision is not None:
            self._stuck_ticks = self._kept_waiting_ticks = 0
        return decision

    def _relief(self, running: Sequence[LiveSearch], others: Sequence[LiveSearch]) -> Release | Suspend | GiveUp | None:
        """Whoever can do without goes first: searches that do not run, then the youngest that does, then the only one."""
        idle = next((live for live in reversed(others) if live.holds()), None)
        if idle is not None:
            return Release(idle, self._enough())
        if len(running) > 1:
            return Suspend()
        for only in running:
            if only.holds() or only.guesses.holds():
                return Release(only, self._enough())
            if self._stuck_ticks >= HOPELESS_TICKS:
                return GiveUp(only, self._hopeless())
        return None

    def _stands_still(self, plan: Any) -> bool:
        stands = plan.batch_to_run is None and plan.running_batch.is_empty() and bool(self._scheduler.waiting_queue)
        self._stuck_ticks = self._stuck_ticks + 1 if stands else 0
        return self._stuck_ticks >= STUCK_TICKS

    def _keeps_waiting(self, plan: Any) -> bool:
        """Whether ordinary requests, which go first, have not entered for long: searches hold what they need."""
        waiting = self._scheduler.waiting_queue
        is_kept = bool(waiting) and not isinstance(waiting[0], ChildReq) and not _is_prefill(plan)
        self._kept_waiting_ticks = self._kept_waiting_ticks + 1 if is_kept else 0
        return self._kept_waiting_ticks >= KEPT_WAITING_TICKS

    def _starves(self, plan: Any) -> bool:
        running = len(plan.running_batch.reqs) if plan.running_batch is not None else 0
        if running == 0:
            return False
        scheduler = self._scheduler
        free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
        return bool(free < running * DECODE_HEADROOM_TOKENS * scheduler.page_size)

    def _enough(self) -> int:
        return max(1, int(self._scheduler.max_total_num_tokens) // RELEASED_SHARE)

    def _hopeless(self) -> str:
        return (
            f"the KV pool of {self._scheduler.max_total_num_tokens} tokens cannot take one more step; "
            "lower search_width or max_tokens, or raise --max-total-tokens"
        )


def _is_prefill(plan: Any) -> bool:
    return plan.batch_to_run is not None and plan.batch_to_run.forward_mode.is_extend()
