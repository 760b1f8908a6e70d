"""The pressure valve: searches give up locks when their locks are what keeps the engine from going on.

A trajectory is defined by its tokens, so giving up its lock is always safe: the KV is computed again when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_ets.engine.live import LiveSearch

STUCK_TICKS = 3  # ticks in which requests wait and nothing runs before locks are given up
HOPELESS_TICKS = 200  # the same with no lock left to give up: the youngest search is failed
DECODE_HEADROOM_TOKENS = 2  # per running request: what the next two ticks may need


@dataclass(frozen=True)
class Release:
    """This search gives up its locks."""

    live: LiveSearch


@dataclass(frozen=True)
class GiveUp:
    """This search fails, so that the others can go on."""

    live: LiveSearch
    message: str


class PressureValve:
    """Watches the plans of one scheduler. Decides, and changes nothing."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._stuck_ticks = 0

    def decide(self, plan: Any, searches: Sequence[LiveSearch]) -> Release | GiveUp | None:
        """What must happen after this plan if nothing runs or decoding is about to starve. `searches`: oldest first."""
        waits = bool(self._scheduler.waiting_queue)
        stands_still = plan.batch_to_run is None and plan.running_batch.is_empty() and waits
        self._stuck_ticks = self._stuck_ticks + 1 if stands_still else 0
        if self._stuck_ticks < STUCK_TICKS and not self._starves(plan):
            return None
        youngest_first = list(reversed(searches))
        for live in youngest_first:
            if live.holds():
                self._stuck_ticks = 0
                return Release(live)
        if self._stuck_ticks < HOPELESS_TICKS:
            return None
        self._stuck_ticks = 0
        return next((GiveUp(live, self._hopeless()) for live in youngest_first if not live.is_answered), None)

    def _starves(self, plan: Any) -> bool:
        running = len(plan.running_batch.reqs) if plan.running_batch is not None else 0
        if running == 0:
            return False
        scheduler = self._scheduler
        free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
        return bool(free < running * DECODE_HEADROOM_TOKENS * scheduler.page_size)

    def _hopeless(self) -> str:
        return (
            f"the KV pool of {self._scheduler.max_total_num_tokens} tokens cannot take one more step; "
            "lower search_width or max_tokens, or raise --max-total-tokens"
        )
