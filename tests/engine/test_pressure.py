"""When the pressure valve opens, and for whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ets.engine.children import ChildReq
from sglang_ets.engine.pressure import (
    DECODE_HEADROOM_TOKENS,
    HOPELESS_TICKS,
    KEPT_WAITING_TICKS,
    RELEASED_SHARE,
    STUCK_TICKS,
    GiveUp,
    PressureValve,
    Release,
    Suspend,
)
from tests.engine.fakes import FakeBatch

POOL = 500
ENOUGH = POOL // RELEASED_SHARE


def scheduler(free: int = 100, waiting: int = 1, page_size: int = 1) -> Any:
    return SimpleNamespace(
        waiting_queue=[object()] * waiting,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: free - 10),
        tree_cache=SimpleNamespace(evictable_size=lambda: 10),
        page_size=page_size,
        max_total_num_tokens=POOL,
    )


def search(num_holds: int = 1, is_answered: bool = False, num_guessed: int = 0) -> Any:
    guesses = SimpleNamespace(holds=lambda: [object()] * num_guessed)
    return SimpleNamespace(holds=lambda: [object()] * num_holds, is_answered=is_answered, guesses=guesses)


def plan(running: int = 0, runs: bool = False, prefills: bool = False) -> Any:
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: prefills))
    return SimpleNamespace(batch_to_run=batch if runs else None, running_batch=FakeBatch([object()] * running))


STILL = plan()


def decide_until_stuck(valve: PressureValve, running: list[Any], others: list[Any]) -> Any:
    """The decision of the first tick in which a standstill counts as one; there was none before."""
    decisions = [valve.decide(STILL, running, others) for _ in range(STUCK_TICKS)]
    assert decisions[:-1] == [None] * (STUCK_TICKS - 1)
    return decisions[-1]


def test_the_youngest_running_search_gives_way_after_some_ticks_of_standstill() -> None:
    valve, old, young = PressureValve(scheduler()), search(), search()
    for _ in range(2):  # after each decision it waits again
        assert decide_until_stuck(valve, [old, young], []) == Suspend()


def test_searches_that_do_not_run_give_up_their_locks_first_the_youngest_of_them_first() -> None:
    valve, old, young, suspended, later = PressureValve(scheduler()), search(), search(), search(), search()
    assert decide_until_stuck(valve, [old, young], [suspended, later]) == Release(later, ENOUGH)
    assert decide_until_stuck(valve, [old, young], [suspended, search(num_holds=0)]) == Release(suspended, ENOUGH)


def test_the_only_running_search_gives_up_its_own_locks() -> None:
    only = search()
    assert decide_until_stuck(PressureValve(scheduler()), [only], [search(num_holds=0)]) == Release(only, ENOUGH)


def test_what_the_only_search_guessed_is_a_lock_to_give_up() -> None:
    only = search(num_holds=0, num_guessed=1)
    assert decide_until_stuck(PressureValve(scheduler()), [only], []) == Release(only, ENOUGH)


def test_a_tick_in_which_something_runs_starts_the_count_anew() -> None:
    valve, live = PressureValve(scheduler()), search()
    for _ in range(STUCK_TICKS - 1):
        assert valve.decide(STILL, [live], []) is None
    assert valve.decide(plan(runs=True), [live], []) is None
    assert [valve.decide(STILL, [live], []) for _ in range(STUCK_TICKS - 1)] == [None] * (STUCK_TICKS - 1)


def test_nothing_waits_so_nothing_is_stuck() -> None:
    valve = PressureValve(scheduler(waiting=0))
    assert [valve.decide(STILL, [search()], []) for _ in range(HOPELESS_TICKS + 1)] == [None] * (HOPELESS_TICKS + 1)


@pytest.mark.parametrize("page_size", [1, 16])
def test_decoding_that_is_about_to_starve_opens_it_at_once(page_size: int) -> None:
    need = 3 * DECODE_HEADROOM_TOKENS * page_size
    live = search()
    assert PressureValve(scheduler(need, page_size=page_size)).decide(plan(3, True), [live], []) is None
    assert PressureValve(scheduler(need - 1, page_size=page_size)).decide(plan(3, True), [live], []) == Release(
        live, ENOUGH
    )


@pytest.mark.parametrize(("prefills", "decision"), [(False, Suspend()), (True, None)])
def test_an_ordinary_request_that_cannot_enter_for_long_makes_a_search_give_way(prefills: bool, decision: Any) -> None:
    valve = PressureValve(scheduler())
    decisions = [valve.decide(plan(5, True, prefills), [search(), search()], []) for _ in range(KEPT_WAITING_TICKS)]
    assert decisions == [None] * (KEPT_WAITING_TICKS - 1) + [decision]


def test_children_that_wait_behind_running_ones_are_no_reason() -> None:
    busy = scheduler()
    busy.waiting_queue = [object.__new__(ChildReq)]
    valve = PressureValve(busy)
    assert [valve.decide(plan(5, True), [search()], []) for _ in range(KEPT_WAITING_TICKS)] == [
        None
    ] * KEPT_WAITING_TICKS


def test_the_only_search_fails_when_it_has_no_lock_left_to_give_up() -> None:
    valve, only = PressureValve(scheduler()), search(0)
    decisions = [valve.decide(STILL, [only], [search(0, is_answered=True)]) for _ in range(HOPELESS_TICKS)]
    assert decisions[:-1] == [None] * (HOPELESS_TICKS - 1)
    last = decisions[-1]
    assert isinstance(last, GiveUp)
    assert last.live is only
    assert "pool of 500 tokens" in last.message and "--max-total-tokens" in last.message
    assert valve.decide(STILL, [only], []) is None  # the count begins anew


def test_without_a_running_search_there_is_nobody_to_fail() -> None:
    valve = PressureValve(scheduler())
    decisions = [valve.decide(STILL, [], [search(0, is_answered=True)]) for _ in range(HOPELESS_TICKS)]
    assert decisions == [None] * HOPELESS_TICKS
