"""Children that start without a prefill: their rows and locks, and what happens where they cannot."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_ets.core.registry import BUILT_IN
from sglang_ets.engine.children import ChildReq, ChildSpec, SearchIds, counts_outputs, make_child
from sglang_ets.engine.forks import ForkRoom, Forks, can_fork
from sglang_ets.kv import Hold
from tests.engine.fakes import FakeForks, FakeScheduler, World, given, request
from tests.prm.streams import Streams

ALGORITHMS = tuple(name for name in BUILT_IN if name != "subpool")  # whose revived leaves are prefilled


def grown(forks: str, *, algorithm: str = "ets", **fields: Any) -> World:
    world = World()
    world.scheduler.server_args._ets["forks"] = forks
    world.ask(algorithm=algorithm, return_tree=True, **fields)
    world.run()
    world.assert_balanced()
    return world


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_search_prefills_its_prompt_and_nothing_else(algorithm: str) -> None:
    forked, extended = (grown(forks, algorithm=algorithm) for forks in ("decode", "extend"))
    assert len(forked.scheduler.prefilled) == 1
    assert len(extended.scheduler.prefilled) == 1 + forked.answer()["search"]["nodes_made"]
    assert forked.answer()["tree"] == extended.answer()["tree"]


def test_a_prompt_of_one_token_has_nothing_to_fork_from() -> None:
    world = World()
    world.ask(prompt="Q", algorithm="rebase", max_new_tokens=60)
    world.run()
    first_level = [rid for rid in world.scheduler.prefilled if not rid.endswith("/0/")]
    assert len(first_level) == 4
    assert world.answer()["search"]["nodes_made"] == 16
    world.assert_balanced()


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens"])
def test_a_search_whose_draws_count_outputs_is_extended(name: str) -> None:
    world = World()
    req = request("pa", "Q: 1+1?\n")
    assert not counts_outputs(req.sampling_params)
    setattr(req.sampling_params, name, 2)
    assert counts_outputs(req.sampling_params)
    world.scheduler.add(req)
    world.run()
    assert len(world.scheduler.prefilled) == 1 + world.answer()["search"]["nodes_made"]
    world.assert_balanced()


def text(ids: Sequence[int]) -> bytes:
    return bytes(list(ids))


def child_of(given: list[int], stop: list[str], num_new: int = 20) -> ChildReq:
    spec = ChildSpec(SearchIds().new(), request("pa", "Q", stop=stop), 5, ("\n",))
    return make_child(spec, [spec.member(1, (0,))], given, num_new, Hold("x", 0, "lock"))


def test_a_fork_has_its_last_input_among_its_outputs_and_nobody_sees_it_there() -> None:
    child = child_of([*b"ab"], stop=["bc"], num_new=3)
    assert (text(child.origin_input_ids), text(child.output_ids)) == (b"Qa", b"b")
    assert child.sampling_params.max_new_tokens == 4
    assert (text(given(child)), child.step_ids) == (b"Qab", ())
    child.output_ids.extend(b"c")
    child.update_finish_state()
    assert not child.finished(), "the b stands before the step"
    child.output_ids.extend(b"b")
    child.update_finish_state()
    assert not child.finished()
    child.output_ids.extend(b"c")
    child.update_finish_state()
    assert isinstance(child.finished_reason, FINISH_MATCHED_STR)
    assert text(child.step_ids) == b"cbc"


def test_a_fork_ends_at_the_same_length_as_an_extended_child() -> None:
    child = child_of([*b"ab"], stop=[], num_new=2)
    for token in b"xy":
        assert not child.finished()
        child.output_ids.append(token)
        child.update_finish_state()
    assert child.finished_reason.to_json() == {"type": "length", "length": 3}
    assert text(child.step_ids) == b"xy"


def test_room_is_what_nobody_else_may_need() -> None:
    scheduler = FakeScheduler(pool_tokens=100)
    running, waiting = (request(rid, "Q" * 10, search=False, max_new_tokens=20) for rid in "ab")
    running.output_ids.extend(b"12345")
    scheduler.running_batch.reqs = [running]
    scheduler.last_batch = scheduler.running_batch  # shown twice, counted once
    scheduler.waiting_queue = [waiting]
    scheduler.new_token_ratio_tracker.current = 0.4
    room = FakeForks(scheduler).room()
    assert room.tokens == 100 - 0.4 * 15 - 30
    assert room.rows == 300 - 1  # less the one that waits
    scheduler.max_running_requests = 5
    assert FakeForks(scheduler).room().rows == 5 - 2


def test_room_is_taken_whole_or_not_at_all() -> None:
    room = ForkRoom(rows=2, tokens=10)
    assert [room.take(6), room.take(6), room.take(4), room.take(0)] == [True, False, True, False]
    assert (room.rows, room.tokens) == (0, 0)


def test_what_finds_no_room_waits_in_the_queue_and_is_extended() -> None:
    world = World(FakeScheduler(pool_tokens=130))
    world.ask(algorithm="rebase", return_tree=True, max_new_tokens=40, max_step_tokens=30)
    world.run()
    assert 1 < len(world.scheduler.prefilled) < 1 + world.answer()["search"]["nodes_made"]
    assert (
        world.answer()["tree"]
        == grown("extend", algorithm="rebase", max_new_tokens=40, max_step_tokens=30).answer()["tree"]
    )
    world.assert_balanced()


def test_a_child_whose_path_lost_its_lock_is_extended() -> None:
    world = World()
    world.ask(algorithm="rebase", return_tree=True)
    ticks = world.ticks()
    while len(world.live().search.tree.nodes) == 1:
        next(ticks)
    world.ets._release(world.live(), 10**6)
    for _ in ticks:
        pass
    assert len(world.scheduler.prefilled) == 1 + 4  # the prompt, and the first level
    assert world.answer()["tree"] == grown("extend", algorithm="rebase").answer()["tree"]
    world.assert_balanced()


def test_a_path_shorter_than_what_the_child_continues_is_a_bug() -> None:
    scheduler = FakeScheduler()
    child = child_of([*b"ab"], stop=[])
    unknown = MatchPrefixParams(key=RadixKey(array("q", [1])))
    child.source = Hold("x", int(scheduler.tree_cache.match_prefix(unknown).last_device_node), "lock")
    with pytest.raises(RuntimeError, match="forks from 0 cached tokens; expected 2"):
        FakeForks(scheduler).join([child], scheduler.running_batch)
    assert scheduler.req_to_token_pool.available_size() == 300


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 16},
        {"tree_cache": SimpleNamespace()},
        {"enable_hierarchical_cache": True},
        {"enable_hisparse": True},
        {"spec_algorithm": SimpleNamespace(is_none=lambda: False)},
        {"model_config": SimpleNamespace(is_encoder_decoder=True)},
    ],
)
def test_where_children_cannot_share_slots(changes: dict[str, Any]) -> None:
    scheduler = FakeScheduler()
    assert can_fork(scheduler)
    for name, value in changes.items():
        setattr(scheduler, name, value)
    assert not can_fork(scheduler)


def test_a_retracted_fork_goes_on_from_its_tokens() -> None:
    world = World(FakeScheduler(tokens_per_tick=1))
    world.ask(algorithm="rebase", return_tree=True)
    ticks = world.ticks()
    while not any(len(req.output_ids) > 2 for req in world.scheduler.running_batch.reqs):
        next(ticks)
    retracted = world.scheduler.retract(world.scheduler.running_batch.reqs[0])
    world.scheduler.retracted.append(retracted)
    assert isinstance(retracted, ChildReq)
    for _ in ticks:
        pass
    assert world.scheduler.prefilled[1:] == [retracted.rid]
    assert world.answer()["tree"] == grown("extend", algorithm="rebase").answer()["tree"]
    world.assert_balanced()


def test_the_input_of_a_fork_comes_behind_a_pass_that_still_runs() -> None:
    """The row was a request's whose last pass, seen too late, writes its token where the input of the next one is read."""
    streams, inputs = Streams(enable_overlap=True), torch.zeros(8, dtype=torch.int64)

    def stash(rows: torch.Tensor, payload: Any) -> None:
        streams.events.append("stash")
        inputs[rows] = payload.bonus_tokens

    streams.future_map = SimpleNamespace(stash=stash)  # type: ignore[attr-defined]
    Forks(streams)._leave_inputs(torch.tensor([5, 2]), torch.tensor([70, 71]), "cpu")
    assert streams.events == ["on forward", "forward waits for schedule", "stash", "off forward"]
    assert inputs.tolist() == [0, 0, 71, 0, 0, 70, 0, 0]
