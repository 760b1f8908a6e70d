"""Two ranks of one server, each in a thread, that differ in clock, solver, embeddings and comparison of answers: one tree."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from queue import SimpleQueue
from threading import Event
from typing import Any, TypeVar

import numpy as np
import pytest

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.registry import BUILT_IN
from sglang_ets.core.selection import Level, Selection, SelectionPolicy
from sglang_ets.engine.children import SearchIds
from sglang_ets.engine.decisions import Decision, Decisions, Failed, RanksDiffer
from sglang_ets.prm.ranks import ONE_RANK, OneRank, Ranks
from sglang_ets.prm.steps import PrmError, ScoreJob, StepScore
from tests.engine.fakes import DELIMITER, FakeScheduler, ScriptedPrm, World, tokens
from tests.engine.test_strands import steps_of_two_letters

ALGORITHMS = tuple(BUILT_IN)
AGES_S = 1e5
WAIT_LIMIT_S = 60.0
TIMES = ("seconds", "ms")  # in names of figures that no two ranks have alike
T = TypeVar("T")


class First:
    is_alone = False
    is_first = True

    def __init__(self, said: SimpleQueue[Any]) -> None:
        self._said = said

    def from_first(self, value: T) -> T:
        self._said.put(value)
        return value


class Second:
    is_alone = False
    is_first = False

    def __init__(self, said: SimpleQueue[Any]) -> None:
        self._said = said

    def from_first(self, value: T) -> T:
        said: T = self._said.get(timeout=WAIT_LIMIT_S)
        return said


def test_ids_of_searches_are_the_first_ranks() -> None:
    said: SimpleQueue[Any] = SimpleQueue()
    first, second = SearchIds(First(said)), SearchIds(Second(said))
    assert [first.new(), first.new()] == [second.new(), second.new()]
    assert first.new() != SearchIds(OneRank()).new(), "other servers have others"


class NeverAsked:
    """The policy of a rank that must not decide."""

    def select(self, level: Level, config: SearchConfig) -> Selection:
        raise AssertionError("only the first rank selects")


class OtherPrm(ScriptedPrm):
    """Equal scores, as the ranks share them, with other embeddings."""

    def score(self, jobs: Sequence[ScoreJob]) -> list[Any]:
        return [
            outcome
            if isinstance(outcome, PrmError)
            else (StepScore(outcome[0].score, -outcome[0].embedding), outcome[1])
            for outcome in super().score(jobs)
        ]


def halves(child: Any) -> Sequence[int]:
    """Three steps, and an answer that may be written as `0.5` or as `1/2`."""
    depth, number = bytes(child.origin_input_ids).count(DELIMITER.encode()), child.node_id
    answers = ("0.5", "1/2", "0.7", "2/4")
    return tokens(f"so \\boxed{{{answers[number % 4]}}}", ends=True) if depth == 3 else tokens(f"a={number}{DELIMITER}")


def two_worlds(script: Callable[[Any], Sequence[int]] = halves) -> tuple[World, World]:
    said: SimpleQueue[Any] = SimpleQueue()
    nobody: dict[Any, SelectionPolicy] = dict.fromkeys(BUILT_IN, NeverAsked())
    first = World(FakeScheduler(script, tokens_per_tick=2), ranks=First(said))
    return first, World(FakeScheduler(script, tokens_per_tick=2), OtherPrm(), nobody, Second(said))


def run_both(worlds: Sequence[World], drive: Callable[[World], None]) -> None:
    with ThreadPoolExecutor(2) as threads:
        for run in [threads.submit(drive, world) for world in worlds]:
            run.result()


def without_times(result: Any) -> Any:
    if isinstance(result, dict):
        return {
            name: without_times(value)
            for name, value in result.items()
            if not any(part in name.split("_") for part in TIMES)
        }
    return [without_times(item) for item in result] if isinstance(result, (list, tuple)) else result


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_second_rank_grows_the_tree_of_the_first_and_decides_nothing(algorithm: str) -> None:
    def drive(world: World) -> None:
        world.ask("one", algorithm=algorithm, search_width=8, return_tree=True, n=4)
        world.ask("two", algorithm=algorithm, search_width=4, return_tree=True, seed=7)
        world.run()

    worlds = two_worlds()
    run_both(worlds, drive)
    for rid in ("one", "two"):
        first, second = (without_times(world.answer(rid)) for world in worlds)
        assert first == second
        assert first["results"][0]["text"]
    for world in worlds:
        world.assert_balanced()


@pytest.mark.parametrize("algorithm", ["rebase", "ets", "dvts"])
def test_both_ranks_begin_the_same_steps_before_selection(algorithm: str) -> None:
    def drive(world: World) -> None:
        world.ask(algorithm=algorithm, search_width=16, return_tree=True, speculate=True)
        for _ in world.ticks():
            awaited = [live.awaited[1] for live in world.ets.searches.values() if live.awaited is not None]
            wait(
                [future for future in awaited if future is not None], WAIT_LIMIT_S
            )  # as if a forward pass took so long

    worlds = two_worlds(steps_of_two_letters)
    run_both(worlds, drive)
    first, second = (without_times(world.answer()) for world in worlds)
    assert first == second
    assert first["search"]["speculation"]["children"] > 0
    for world in worlds:
        world.assert_balanced()


def test_only_the_first_ranks_clock_ends_a_search() -> None:
    def drive(world: World) -> None:
        world.ask(algorithm="rebase", deadline_s=1e4, return_tree=True)
        if world is worlds[1]:
            world.live().started_s -= AGES_S  # its clock is early: nothing happens
        for _ in world.ticks():
            if world is worlds[0] and any(live.kv for live in world.ets.searches.values()):
                world.live().started_s -= AGES_S

    worlds = two_worlds()
    run_both(worlds, drive)
    first, second = (without_times(world.answer()) for world in worlds)
    assert first == second
    assert first["search"]["finish_reason"] == "deadline"
    assert first["search"]["levels"] > 0, "the clock of the second rank would have ended it before the first level"
    for world in worlds:
        world.assert_balanced()


def test_answers_are_compared_by_value_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def drive(world: World) -> None:
        world.ask(algorithm="rebase", answer="majority", search_width=8)
        world.run()

    worlds = two_worlds()
    asked: list[int] = []
    for number, world in enumerate(worlds):
        ask = world.ets._voting._process.ask
        monkeypatch.setattr(
            world.ets._voting._process, "ask", lambda *given, n=number, ask=ask: (asked.append(n), ask(*given))[1]
        )
    run_both(worlds, drive)
    worlds[0].ets._voting._process.stop()
    assert asked == [0]
    first, second = (world.answer()["results"][0] for world in worlds)
    assert first == second
    assert first["votes"] == 6, "0.5, 1/2 and 2/4 are one answer"


def test_work_that_raises_fails_its_search_on_both_ranks() -> None:
    class Broken:
        def select(self, level: Level, config: SearchConfig) -> Selection:
            raise ZeroDivisionError("no selection today")

    def drive(world: World) -> None:
        world.ask("breaks", algorithm="dvts")
        world.ask("runs", algorithm="rebase")
        world.run()

    worlds = two_worlds()
    worlds[0].policies["dvts"] = Broken()
    run_both(worlds, drive)
    for world in worlds:
        assert world.error("breaks") == "search failed: ZeroDivisionError: no selection today"
        assert world.answer("runs")
        world.assert_balanced()


def test_a_rank_that_has_lost_a_search_stops_with_both_states() -> None:
    def drive(world: World) -> None:
        world.ask("one", algorithm="rebase", deadline_s=1e4)
        world.ask("two", algorithm="rebase", deadline_s=1e4)
        if world is worlds[1]:
            world.ets.fail(next(iter(world.ets.searches.values())), "a fault of this rank alone")
        world.run()

    worlds = two_worlds()
    with pytest.raises(
        RanksDiffer, match=r"this rank runs .* \(\(1, 0, ''\), .*, expected \(\(1, 1, ''\), .* as on the first"
    ):
        run_both(worlds, drive)
    assert worlds[0].answer("one")


def test_one_rank_selects_without_a_solver_at_once() -> None:
    said: SimpleQueue[Any] = SimpleQueue()
    ranks: list[Ranks] = [ONE_RANK, First(said)]
    assert [Decisions(one).in_loop(is_cheap=True) for one in ranks] == [True, False]
    assert [Decisions(one).in_loop(is_cheap=False) for one in ranks] == [False, False]


def test_a_decision_travels_between_processes() -> None:
    import pickle

    selection = Selection(np.array([2, 0, 1]), np.array([0, 0, 1]))
    for decision in (Decision(0, "select", selection), Decision(1, "answer", Failed("no")), Decision(2, "deadline")):
        again = pickle.loads(pickle.dumps(decision))
        assert replace(again, value=None) == replace(decision, value=None)
    again = pickle.loads(pickle.dumps(selection))
    assert again.allocation.tolist() == [2, 0, 1]


def test_a_result_that_is_not_there_yet_is_no_decision() -> None:
    world = World()
    world.ask(algorithm="rebase")
    live = world.live()
    live.awaited = ("select", Future())
    decisions = Decisions(ONE_RANK)
    started = time.perf_counter()
    decisions.wait_for_one([live])
    assert time.perf_counter() - started < 10
    assert decisions.due([live]) == []


def test_a_guess_that_has_not_begun_when_its_level_is_complete_keeps_no_selection_waiting() -> None:
    world = World()
    world.ask("one", algorithm="ets")
    world.ask("two", algorithm="ets")
    busy, guessing = world.ets.searches.values()
    decisions, may_go_on, chosen = Decisions(ONE_RANK), Event(), list[str]()
    decisions.select(busy, lambda: may_go_on.wait(WAIT_LIMIT_S))
    decisions.guess(guessing, lambda: chosen.append("guess"))
    decisions.select(guessing, lambda: chosen.append("select"))
    assert guessing.awaited is not None
    assert guessing.awaited[0] == "select"
    may_go_on.set()
    wait([guessing.awaited[1]], WAIT_LIMIT_S)  # type: ignore[list-item]
    assert chosen == ["select"]
