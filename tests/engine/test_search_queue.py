"""Several searches in pools that cannot hold them all: who starts, who waits, who gives way, and what ordinary requests see."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq

from sglang_ets.core.capacity import Need
from sglang_ets.core.config import SearchConfig
from sglang_ets.engine.children import ChildReq
from tests.engine.fakes import FakeScheduler, World, given, request, tokens

LONG_STEP = "0123456789abcdef"


def long_steps(child: ChildReq) -> list[int]:
    """Four steps that share nothing between siblings."""
    depth = bytes(given(child)).count(b"\n")
    return tokens(f"{child.node_id:04d}{LONG_STEP}\n", ends=depth == 4)


def crowded(pool_tokens: int = 500, **settings: Any) -> World:
    world = World(FakeScheduler(long_steps, pool_tokens=pool_tokens))
    world.scheduler.server_args._ets.update(settings)
    return world


def ask(world: World, rid: str, **fields: Any) -> Any:
    return world.ask(rid, algorithm="rebase", search_width=4, max_new_tokens=100, max_step_tokens=30, **fields)


def test_searches_that_do_not_fit_together_run_one_after_another_without_losing_kv() -> None:
    world = crowded()
    for rid in ("a", "b", "c"):
        ask(world, rid)
    state = world.ets.describe()
    ended = []
    for _ in world.ticks():
        state = world.ets.describe()
        assert state["running"] + state["suspended"] + state["waiting"] <= 3
        ended += [rid for rid in ("a", "b", "c") if world.scheduler.output_streamer.responses(rid) and rid not in ended]
    assert ended == ["a", "b", "c"]
    assert [world.answer(rid)["search"]["kv_pressure_releases"] for rid in ended] == [0, 0, 0]
    world.assert_balanced()


def test_searches_that_fit_run_at_the_same_time() -> None:
    world = crowded(20_000)
    for rid in ("a", "b", "c"):
        ask(world, rid)
    world.scheduler.tick()
    assert (world.ets.describe()["running"], world.ets.describe()["waiting"]) == (3, 0)
    world.run()
    world.assert_balanced()


def test_what_was_learned_lets_more_searches_run_at_once() -> None:
    world = crowded(600)
    ask(world, "first")
    world.run()
    peak = world.answer("first")["search"]["kv_tokens_peak"]
    assert peak < 300, "two fit into the pool"
    ask(world, "a")
    ask(world, "b")
    world.scheduler.tick()
    assert world.ets.describe()["running"] == 2
    world.run()
    world.assert_balanced()


def test_beyond_the_bound_a_search_is_refused_and_the_others_are_answered() -> None:
    world = crowded(max_waiting=1)
    for rid in ("a", "b", "c"):
        ask(world, rid)
        world.scheduler.tick()
    assert "1 searches wait already" in world.error("c")
    (sent,) = world.scheduler.output_streamer.responses("c")
    assert sent.finished is not None and sent.finished["status_code"] == 429
    world.run()
    assert world.answer("a") and world.answer("b")
    world.assert_balanced()


def test_a_search_of_higher_priority_starts_before_those_that_wait() -> None:
    world = crowded()
    ask(world, "a")
    world.scheduler.tick()
    for rid, priority in (("b", 0), ("urgent", 7)):
        req = request(rid, "Q: 1+1?\n", algorithm="rebase", search_width=4, max_new_tokens=100, max_step_tokens=30)
        req.priority = priority
        world.scheduler.add(req)
    ended: list[str] = []
    for _ in world.ticks():
        ended += [
            rid for rid in ("a", "b", "urgent") if world.scheduler.output_streamer.responses(rid) and rid not in ended
        ]
    assert ended == ["a", "urgent", "b"]
    world.assert_balanced()


def test_a_wrong_estimate_makes_the_youngest_give_way_and_go_on_later() -> None:
    world = crowded(290)
    world.ets._estimates.observe(SearchConfig(algorithm="rebase", width=4), Need(8, 8), Need(9, 9))  # far too small
    ask(world, "a")
    ask(world, "b")
    suspended = 0
    for _ in world.ticks():
        suspended = max(suspended, world.ets.describe()["suspended"])
    assert suspended == 1
    assert world.answer("a")["search"]["kv_pressure_releases"] == 0, "the one that began first keeps its KV"
    assert world.answer("b")["search"]["kv_pressure_releases"] > 0
    world.assert_balanced()


@pytest.mark.parametrize("phase", ["waiting", "running"])
def test_a_client_that_leaves_makes_room(phase: str) -> None:
    world = crowded()
    for rid in ("a", "b", "c"):
        ask(world, rid)
    world.scheduler.tick()
    world.scheduler.tick()
    gone = {"waiting": "b", "running": "a"}[phase]
    world.scheduler.abort_request(AbortReq(rid=gone))
    world.run()
    assert world.status(gone) == 499
    for rid in {"a", "b", "c"} - {gone}:
        assert world.answer(rid)
    world.assert_balanced()


def test_an_ordinary_request_goes_before_steps_that_wait() -> None:
    world = crowded(20_000, max_running_steps=2)
    ask(world, "a")
    world.scheduler.tick()  # the prompt
    world.scheduler.holds_back = lambda _child: True
    world.scheduler.tick()
    ordinary = request("ordinary", "x", search=False)
    world.scheduler.add(ordinary)
    world.ets.before_batch(world.scheduler.running_batch)
    waiting = world.scheduler.waiting_queue
    assert waiting[0] is ordinary
    assert len(waiting) == 3, "no more steps are in the engine than the flag says"
    waiting.remove(ordinary)
    world.scheduler.holds_back = lambda _child: False
    world.run()
    assert world.answer("a")
    world.assert_balanced()


def test_a_deadline_ends_a_search_that_still_waits() -> None:
    world = crowded()
    ask(world, "a")
    ask(world, "b", deadline_s=1.0)
    world.scheduler.tick()
    next(live for live in world.ets.searches.values() if live.rid == "b").started_s -= 100.0
    world.run()
    assert (world.status("b"), "deadline_s of 1 passed" in world.error("b")) == (504, True)
    assert world.answer("a")
    world.assert_balanced()


@pytest.mark.parametrize(("strength", "is_dearer"), [(0.0, False), (3.0, True)])
def test_kv_is_dearer_in_a_full_pool_if_the_server_is_told_so(strength: float, is_dearer: bool) -> None:
    world = crowded(170, kv_pressure=strength)
    world.ask("a", algorithm="ets_kv", kv_cost_weight=0.5, search_width=4, max_new_tokens=100, max_step_tokens=30)
    world.run()
    figures = world.answer("a")["search"]
    assert figures["kv_cost_weight"] == 0.5, "what was asked for stays as it is"
    assert (figures["kv_cost_weight_max"] is not None) == is_dearer
    assert not is_dearer or 0.5 < figures["kv_cost_weight_max"] <= 0.5 * (1 + strength)
    world.assert_balanced()
