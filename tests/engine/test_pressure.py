"""When the pressure valve opens, and for whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ets.engine.pressure import (
    DECODE_HEADROOM_TOKENS,
    HOPELESS_TICKS,
    STUCK_TICKS,
    GiveUp,
    PressureValve,
    Release,
)
from tests.engine.fakes import FakeBatch


def scheduler(free: int = 100, waiting: int = 1, page_size: int = 1) -> Any:
    return SimpleNamespace(
        waiting_queue=[object()] * waiting,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: free - 10),
        tree_cache=SimpleNamespace(evictable_size=lambda: 10),
        page_size=page_size,
        max_total_num_tokens=500,
    )


def search(num_holds: int = 1, is_answered: bool = False) -> Any:
    return SimpleNamespace(holds=lambda: [object()] * num_holds, is_answered=is_answered)


def plan(running: int = 0, runs: bool = False) -> Any:
    return SimpleNamespace(batch_to_run=object() if runs else None, running_batch=FakeBatch([object()] * running))


STILL = plan()


def test_locks_are_given_up_after_some_ticks_of_standstill_youngest_first() -> None:
    valve, old, young = PressureValve(scheduler()), search(), search()
    decisions = [valve.decide(STILL, [old, young]) for _ in range(2 * STUCK_TICKS)]
    opened = [None] * (STUCK_TICKS - 1) + [Release(young)]
    assert decisions == opened * 2  # after each release it waits again


def test_a_search_without_locks_is_passed_over() -> None:
    valve, old, young = PressureValve(scheduler()), search(), search(num_holds=0)
    assert [valve.decide(STILL, [old, young]) for _ in range(STUCK_TICKS)][-1] == Release(old)


def test_a_tick_in_which_something_runs_starts_the_count_anew() -> None:
    valve, live = PressureValve(scheduler()), search()
    for _ in range(STUCK_TICKS - 1):
        assert valve.decide(STILL, [live]) is None
    assert valve.decide(plan(runs=True), [live]) is None
    assert [valve.decide(STILL, [live]) for _ in range(STUCK_TICKS - 1)] == [None] * (STUCK_TICKS - 1)


def test_nothing_waits_so_nothing_is_stuck() -> None:
    valve = PressureValve(scheduler(waiting=0))
    assert [valve.decide(STILL, [search()]) for _ in range(HOPELESS_TICKS + 1)] == [None] * (HOPELESS_TICKS + 1)


@pytest.mark.parametrize("page_size", [1, 16])
def test_decoding_that_is_about_to_starve_opens_it_at_once(page_size: int) -> None:
    need = 3 * DECODE_HEADROOM_TOKENS * page_size
    live = search()
    assert PressureValve(scheduler(need, page_size=page_size)).decide(plan(3, True), [live]) is None
    assert PressureValve(scheduler(need - 1, page_size=page_size)).decide(plan(3, True), [live]) == Release(live)


def test_without_a_lock_left_the_youngest_search_that_is_not_answered_fails() -> None:
    valve = PressureValve(scheduler())
    old, young, done = search(0), search(0), search(0, is_answered=True)
    decisions = [valve.decide(STILL, [old, young, done]) for _ in range(HOPELESS_TICKS)]
    assert decisions[:-1] == [None] * (HOPELESS_TICKS - 1)
    last = decisions[-1]
    assert isinstance(last, GiveUp)
    assert last.live is young
    assert "pool of 500 tokens" in last.message and "--max-total-tokens" in last.message
    assert valve.decide(STILL, [old]) is None  # the others get their time


def test_searches_that_are_all_answered_already_are_left_alone() -> None:
    valve = PressureValve(scheduler())
    decisions = [valve.decide(STILL, [search(0, is_answered=True)]) for _ in range(HOPELESS_TICKS)]
    assert decisions == [None] * HOPELESS_TICKS
