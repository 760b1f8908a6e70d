"""Searches amid random events, on one rank and on two: each is answered once, on both alike, and nothing is left behind.

What happens follows from a seed alone: work of other threads is done at once, and seen some ticks later.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import pytest
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_ets.core.registry import BUILT_IN
from sglang_ets.engine.children import ChildReq
from sglang_ets.prm.ranks import ONE_RANK
from sglang_ets.prm.steps import PrmError, ScoreJob
from tests.engine.fakes import ScriptedPrm, World, request, tokens
from tests.engine.test_decisions import AGES_S, First, NeverAsked, OtherPrm, Second, without_times
from tests.engine.test_speculation import InLoop
from tests.engine.test_strands import MODES, release_all, retract_one, steps_of_two_letters, world_of

EVENT_TICKS, MOST_TICKS = 1000, 6000  # while a search is suspended at every other tick it gets nowhere
PROMPT = "Q: 1+1?\n"
T = TypeVar("T")
Event = Callable[[World, random.Random], None]


class Late(Future[Any]):
    """It has its result, and says so when it was asked a few times."""

    num_unseen = 0

    def done(self) -> bool:
        self.num_unseen -= 1
        return self.num_unseen < 0 and super().done()


class Worker:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def submit(self, work: Callable[..., Any], *args: Any) -> Late:
        future = Late()
        future.num_unseen = self._rng.choice([0, 0, 1, 3, 10])
        future.set_result(work(*args))
        return future


class FollowingRank(Second):
    """It ticks after the first one, so what that one says is there."""

    def from_first(self, value: T) -> T:
        said: T = self._said.get_nowait()
        return said


# ---- what happens ----


def some(rng: random.Random, reqs: Sequence[Any]) -> Any:
    children = [req for req in reqs if isinstance(req, ChildReq) and not req.finished()]
    return rng.choice(children) if children else None


def retract(world: World, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 8)):
        retract_one(world)


def release(world: World, _rng: random.Random) -> None:
    release_all(world)


def suspend(world: World, _rng: random.Random) -> None:
    world.ets._suspend_youngest()


def evict(world: World, rng: random.Random) -> None:
    world.scheduler.tree_cache.evict(EvictParams(num_tokens=rng.randrange(1, 100)))


def client_leaves(world: World, rng: random.Random) -> None:
    world.scheduler.abort_request(AbortReq(rid=f"p{rng.randrange(4)}"))


def child_times_out(world: World, rng: random.Random) -> None:
    child = some(rng, [*world.scheduler.waiting_queue, *world.scheduler.running_batch.reqs])
    if child is not None:
        world.scheduler.abort_request(AbortReq(rid=child.rid, abort_message="too late"))


def engine_ends_child(world: World, rng: random.Random) -> None:
    child = some(rng, world.scheduler.running_batch.reqs)
    if child is not None:
        child.to_finish = FINISH_ABORT("no memory")


def time_is_up(world: World, _rng: random.Random) -> None:
    for live in world.ets.searches.values():
        if live.deadline_s is not None and world.ets._decisions._ranks.is_first:
            live.started_s -= AGES_S


def ordinary_request(world: World, rng: random.Random) -> None:
    rid = f"ordinary{len(world.scheduler.prefilled)}"
    world.scheduler.add(request(rid, PROMPT, search=False, max_new_tokens=rng.randrange(1, 40)))


EVENTS: tuple[Event, ...] = (
    *(retract, release, suspend, evict, client_leaves, child_times_out, engine_ends_child, time_is_up),
    ordinary_request,
)


# ---- the worlds ----


def script(req: Any) -> Sequence[int]:
    return steps_of_two_letters(req) if hasattr(req, "num_given") else tokens("z" * 60)


def worlds_of(seed: int, num_ranks: int) -> list[World]:
    rng, said = random.Random(seed), SimpleQueue[Any]()
    overlaps = rng.random() < 0.5
    traits = {"overlaps": overlaps, "caches_last_token": overlaps and rng.random() < 0.5}
    mode, pool_tokens = rng.choice(MODES), rng.choice([250, 400, 800, 20_000])
    limits = {"max_running_steps": rng.choice([None, None, 1, 3, 8]), "max_running": rng.choice([None, None, 1, 2])}
    share_of_errors, is_in_loop = rng.choice([0.0, 0.0, 0.05]), rng.random() < 0.5
    reads_states = rng.random() < 0.5

    def score_of(job: ScoreJob) -> float | PrmError:
        number = zlib.crc32(f"{seed} {job.depth} {job.step_text}".encode()) % 1000 / 1000
        return PrmError("no number") if number < share_of_errors else number

    made = []
    for rank in range(num_ranks):
        scheduler = world_of(mode, script, pool_tokens, **traits).scheduler
        scheduler.server_args._ets |= {**limits, "kv_pressure": float(seed % 3 == 0)}
        ranks = ONE_RANK if num_ranks == 1 else FollowingRank(said) if rank else First(said)
        prm = (OtherPrm if rank else ScriptedPrm)(score_of, reads_states=reads_states)
        world = World(scheduler, prm, {}, ranks, revives=True)
        if rank:
            world.policies = dict.fromkeys(BUILT_IN, NeverAsked())
        elif is_in_loop:
            world.policies = {algorithm: InLoop(algorithm) for algorithm in BUILT_IN}
        world.ets._decisions._workers = world.ets._voting._thread = Worker(seed)  # type: ignore[assignment]
        made.append(world)
    return made


def fields_of(rng: random.Random) -> dict[str, Any]:
    fields = {
        "algorithm": rng.choice(list(BUILT_IN)),
        "search_width": rng.choice([2, 4, 8, 16]),
        "seed": rng.randrange(5),
    }
    fields |= {"max_step_tokens": 12, "max_new_tokens": rng.choice([20, 60, 200]), "return_tree": True}
    fields |= {"prompt": PROMPT + rng.choice(["", "x"]), "speculate": rng.random() < 0.7, "stream": rng.random() < 0.3}
    fields["deadline_s"] = rng.choice([None, 1e4])
    fields["max_total_tokens"] = rng.choice([None, None, None, 60, 200])
    early_stop = rng.choice(["off", "settled", "likely"])
    return {**fields, "early_stop": early_stop, "n": fields["search_width"] if early_stop == "off" else 1}


def assert_accounted_for(world: World) -> None:
    """Whatever a search waits for is somewhere, and rows are kept for nobody who has left."""
    scheduler, steps = world.scheduler, world.ets._steps
    in_flight = [] if scheduler._in_flight is None else scheduler._in_flight.batch.reqs
    present = {req.rid for req in (*scheduler.waiting_queue, *scheduler.running_batch.reqs, *in_flight)}
    assert steps._inside.keys() <= present
    pending = {child.rid for live in world.ets.searches.values() for child in steps.pending(live.id)}
    for live in world.ets.searches.values():
        assert live.children | live.guesses.children.keys() <= present | pending
        assert live.parted.keys() <= live.children
        assert live.guesses.parted.keys() <= live.guesses.children.keys()


def run(seed: int, num_ranks: int) -> None:
    worlds, rng = worlds_of(seed, num_ranks), random.Random(seed)
    arrivals = sorted((rng.randrange(20), f"p{number}", fields_of(rng)) for number in range(rng.randrange(1, 4)))
    events, rate = rng.sample(EVENTS, rng.randrange(1, len(EVENTS))), rng.choice([0.05, 0.2, 0.5])
    rids = [rid for _, rid, _ in arrivals]
    for tick in range(MOST_TICKS):
        while arrivals and arrivals[0][0] <= tick:
            _, rid, fields = arrivals.pop(0)
            for world in worlds:
                world.ask(rid, **fields)
        if not arrivals and not any(world.ets.searches for world in worlds):
            break
        if tick < EVENT_TICKS and rng.random() < rate:
            event, of_event = rng.choice(events), rng.random()
            for world in worlds:
                event(world, random.Random(of_event))
        for world in worlds:
            world.scheduler.tick()
            assert_accounted_for(world)
    for world in worlds:
        scheduler = world.scheduler
        while scheduler.waiting_queue or scheduler.running_batch.reqs or scheduler._in_flight is not None:
            scheduler.tick()
        world.assert_balanced()
    for rid in rids:
        sent = [world.scheduler.output_streamer.responses(rid) for world in worlds]
        assert [len(one) for one in sent] == [1] * num_ranks
        assert all(without_times(one[0].info) == without_times(sent[0][0].info) for one in sent)
        assert all(one[0].finished == sent[0][0].finished for one in sent)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("block", range(4))
def test_whatever_comes_together_every_search_is_answered_once(
    block: int, num_ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(8 * block, 8 * block + 8):
        run(seed, num_ranks)
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [], seed
