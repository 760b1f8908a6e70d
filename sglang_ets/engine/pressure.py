"""The pressure valve: searches give up locks when their locks are what keeps the engine from going on.

A trajectory is defined by its tokens, so giving up its lock is always safe: the KV is computed again when it is needed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_ets.engine.coordinator import SearchCoordinator

logger = logging.getLogger(__name__)

STUCK_TICKS = 3  # ticks in which requests wait and nothing runs before locks are given up
HOPELESS_TICKS = 200  # the same with no lock left to give up: the youngest search is failed
DECODE_HEADROOM_TOKENS = 2  # per running request: what the next two ticks may need


def relieve(coordinator: SearchCoordinator, plan: Any) -> None:
    """Called after each plan: release the youngest search's locks if nothing runs or decoding is about to starve."""
    scheduler = coordinator.scheduler
    stands_still = plan.batch_to_run is None and plan.running_batch.is_empty() and bool(scheduler.waiting_queue)
    coordinator.stuck_ticks = coordinator.stuck_ticks + 1 if stands_still else 0
    if coordinator.stuck_ticks < STUCK_TICKS and not _starves(scheduler, plan):
        return
    if _release_youngest(coordinator):
        coordinator.stuck_ticks = 0
    elif coordinator.stuck_ticks >= HOPELESS_TICKS:
        coordinator.stuck_ticks = 0
        youngest = list(coordinator.searches.values())[-1]
        if not youngest.is_answered:
            coordinator.fail(
                youngest,
                f"the KV pool of {scheduler.max_total_num_tokens} tokens cannot take one more step; "
                "lower search_width or max_tokens, or raise --max-total-tokens",
            )


def _starves(scheduler: Any, plan: Any) -> bool:
    running = len(plan.running_batch.reqs) if plan.running_batch is not None else 0
    if running == 0:
        return False
    free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    return bool(free < running * DECODE_HEADROOM_TOKENS * scheduler.page_size)


def _release_youngest(coordinator: SearchCoordinator) -> bool:
    for live in reversed(list(coordinator.searches.values())):
        holds = live.holds()
        if not holds:
            continue
        tokens = coordinator.ledger.unique_tokens(holds)
        for hold in holds:
            coordinator.ledger.release(hold)
        live.num_pressure_releases += 1
        logger.info("KV pool under pressure: search %s unlocked %d tokens, to be computed again", live.owner, tokens)
        return True
    return False
