"""No waiting at the barrier: the tree is the one that grows without guesses, and guesses leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.registry import BUILT_IN
from sglang_ets.core.selection import Level, Selection
from sglang_ets.engine.children import ChildReq, child_seed
from sglang_ets.prm.steps import ScoreJob
from sglang_ets.wire import PROGRESS_KEY
from tests.engine.fakes import DELIMITER, VOCAB, FakeScheduler, ScriptedPrm, World, given, request, tokens
from tests.engine.test_strands import (
    MODES,
    asked,
    ended_by_deadline,
    every,
    grown,
    release_all,
    retract_one,
    steps_of_two_letters,
    tree_of,
    world_of,
)

ALGORITHMS = tuple(BUILT_IN)
LEVEL_ALGORITHMS = tuple(name for name in ALGORITHMS if name not in ("best_of_n", "subpool"))


def guessed(world: World, while_running: Callable[[World], None] = lambda _world: None, **fields: Any) -> World:
    return grown(world, while_running, speculate=True, **fields)


class InLoop:
    """A policy that is asked on the loop, so that a test knows when."""

    is_cheap = True

    def __init__(self, algorithm: str) -> None:
        self.select = SearchConfig(algorithm=algorithm).policy.select


def asked_in_loop(world: World) -> World:
    world.policies = {algorithm: InLoop(algorithm) for algorithm in ALGORITHMS}
    return world


def figures(world: World) -> Any:
    return world.answer()["search"]


def same(world: World) -> tuple[Any, ...]:
    """What guesses must not change."""
    answer = world.answer()
    return tree_of(world), answer["results"], answer["usage"], figures(world)["kv_levels"], figures(world)["warnings"]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("algorithm", LEVEL_ALGORITHMS)
def test_trees_are_the_same_with_and_without(algorithm: str, overlaps: bool) -> None:
    for mode in MODES:
        without = grown(world_of(mode, overlaps=overlaps), width=16, algorithm=algorithm)
        world = guessed(asked_in_loop(world_of(mode, overlaps=overlaps)), width=16, algorithm=algorithm)
        assert same(world) == same(without)
        made, told = figures(world)["speculation"], figures(without)["speculation"]
        assert told is None
        assert 0 < made["children_used"] <= made["children"]
        assert made["hit_rate"] == made["children_used"] / made["children"]
        assert 0 < made["leaves"] <= made["children"]
        if mode != "shared":  # where rows share what they compute, it depends on which of them run
            assert figures(world)["tokens_computed"] - figures(without)["tokens_computed"] == made["tokens_wasted"]


@pytest.mark.parametrize("algorithm", LEVEL_ALGORITHMS)
def test_with_kv_of_the_last_tokens_trees_are_the_same_and_kv_but_for_these_tokens(algorithm: str) -> None:
    """With the overlap schedule a row whose step has ended computes its last token, too; a member that parted then has none."""
    for mode in MODES:
        traits = {"overlaps": True, "caches_last_token": True}
        tree, *others, levels, warnings = same(grown(world_of(mode, **traits), width=16, algorithm=algorithm))
        world = guessed(asked_in_loop(world_of(mode, **traits)), width=16, algorithm=algorithm)
        assert (same(world)[0], [*same(world)[1:3]], same(world)[4]) == (tree, others, warnings)
        for ahead, level in zip(figures(world)["kv_levels"], levels, strict=True):
            slack = {"held": level["leaves"], "retained": level["leaves"]}
            assert ahead == {name: pytest.approx(value, abs=slack.get(name, 0)) for name, value in level.items()}


@pytest.mark.parametrize("algorithm", ["ets", "ets_kv", "dora", "particles"])
def test_a_policy_may_be_asked_on_a_worker_thread(algorithm: str) -> None:
    """How many guesses there are depends on when it answers; the tree does not."""
    world = guessed(world_of("shared"), width=16, algorithm=algorithm)
    assert same(world) == same(grown(world_of("shared"), width=16, algorithm=algorithm))


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_search_goes_on_if_a_part_of_a_level_cannot_be_asked_for(
    in_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_asked = 0

    def fail(*_args: Any) -> None:
        nonlocal num_asked
        num_asked += 1
        raise ValueError("too few leaves")

    without = grown(world_of("shared"), width=16, algorithm="ets")
    monkeypatch.setattr("sglang_ets.engine.live.forecast", fail)
    world = world_of("shared")
    world = guessed(asked_in_loop(world) if in_loop else world, width=16, algorithm="ets")
    assert same(world)[:-1] == same(without)[:-1]
    (note,) = figures(world)["warnings"]
    assert note.endswith("asking for a part of a level failed (ValueError: too few leaves)")
    assert num_asked == 1 and figures(world)["speculation"]["children"] == 0


@pytest.mark.parametrize(
    "fields", [{"algorithm": "best_of_n"}, {"algorithm": "subpool"}, {"max_total_tokens": 60}, {"kv_budget_tokens": 50}]
)
def test_where_nothing_is_guessed(fields: dict[str, Any]) -> None:
    world = guessed(world_of("shared"), **fields)
    assert figures(world)["speculation"] is None
    assert same(world) == same(grown(world_of("shared"), **fields))


# ---- four steps of which one is long: "a", "b" and "c" wait for "d" ----


def one_long_step(child: Any) -> Sequence[int]:
    if len(given(child)) == len("Q: 1+1?\n"):
        return tokens(("a", "b", "c", "d" * 9)[child.node_id - 1] + DELIMITER)
    return tokens("the answer is 1", ends=True)


def world_of_one_long_step(mode: str, best: str, **traits: Any) -> World:
    """All width goes to the leaf of this letter."""
    world = world_of(mode, one_long_step, **traits)

    def score_of(job: ScoreJob) -> float:
        return 1.0 if job.step_text[0] == best else 0.5 if job.step_text[0] == "a" else 0.0

    world.prm = ScriptedPrm(score_of)
    return World(world.scheduler, world.prm)


def run_of_one_long_step(mode: str, best: str, *, speculate: bool = True, **traits: Any) -> tuple[World, int]:
    """The world at its end, and how many ticks that took."""
    world = world_of_one_long_step(mode, best, **traits)
    world.ask(algorithm="rebase", return_tree=True, rebase_temperature=0.01, speculate=speculate, early_stop="off")
    num_ticks = sum(1 for _ in world.ticks())
    world.assert_balanced()
    return world, num_ticks


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_what_selection_keeps_has_begun(mode: str, overlaps: bool) -> None:
    world, num_ticks = run_of_one_long_step(mode, "a", overlaps=overlaps)
    without, num_more = run_of_one_long_step(mode, "a", speculate=False, overlaps=overlaps)
    assert tree_of(world) == tree_of(without)
    expected = {"leaves": 1, "children": 3, "children_used": 3, "hit_rate": 1.0, "tokens_wasted": 0}
    assert figures(world)["speculation"] == expected
    assert num_ticks <= num_more, "the fourth child begins at selection"
    if mode != "shared":
        assert figures(world)["tokens_computed"] == figures(without)["tokens_computed"]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_what_selection_drops_is_wasted(mode: str, overlaps: bool) -> None:
    world, num_ticks = run_of_one_long_step(mode, "d", overlaps=overlaps)
    without, num_same = run_of_one_long_step(mode, "d", speculate=False, overlaps=overlaps)
    assert tree_of(world) == tree_of(without)
    told = figures(world)["speculation"]
    assert (told["leaves"], told["children"], told["children_used"], told["hit_rate"]) == (1, 3, 0, 0.0)
    assert told["tokens_wasted"] == figures(world)["tokens_computed"] - figures(without)["tokens_computed"] > 0
    assert num_ticks == num_same, "what nobody wants leaves the engine before the others have ended"


def test_a_guess_that_has_ended_is_a_step_at_once() -> None:
    """Three long steps are there when the fourth step of the first level ends; the one that begins then is short."""
    prompt_ids = request("pa", "Q: 1+1?\n").origin_input_ids
    place_of = {child_seed(1, prompt_ids, place): place for place in ((0, 0), (0, 1), (1, 0), (1, 1))}

    def script(child: Any) -> Sequence[int]:
        place = place_of.get(child.sampling_params.sampling_seed)
        if place is not None:
            return tokens("m" * (1 if place == (1, 1) else 30), ends=True)
        return tokens("aaab"[child.node_id - 1] * (40 if child.node_id == 4 else 1) + DELIMITER)

    trees, ticks = [], []
    for speculate in (False, True):
        world = World(world_of("decode", script).scheduler, ScriptedPrm(lambda job: float(job.step_text[0] != "b")))
        world.ask(search_width=4, algorithm="beam", return_tree=True, speculate=speculate)
        ticks.append(sum(1 for _ in world.ticks()))
        trees.append(tree_of(world))
        world.assert_balanced()
    assert trees[0] == trees[1]
    assert figures(world)["speculation"]["children_used"] == 3
    assert ticks[1] <= ticks[0] - 25


class Fickle:
    """Of a part of a level it keeps both leaves of the letter a, of a whole one the second alone."""

    is_cheap = True

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        allocation = np.zeros(len(level.scores), dtype=np.int64)
        allocation[0] = len(allocation) < 4
        allocation[1] = level.remaining_width - allocation[0]
        return Selection(allocation)


@pytest.mark.parametrize(
    ("mode", "overlaps", "num_used"), [("shared", False, 0), ("decode", False, 2), ("shared", True, 1)]
)
def test_members_of_a_strand_whose_first_one_is_not_wanted_begin_anew(mode: str, overlaps: bool, num_used: int) -> None:
    """With the overlap schedule the second child of the second leaf begins later, in a row of its own."""

    def script(child: Any) -> Sequence[int]:
        if len(given(child)) == len("Q: 1+1?\n"):
            return tokens(("a", "a", "c", "d" * 9)[child.node_id - 1] + DELIMITER)
        return tokens("the answer is 1", ends=True)

    trees = []
    for speculate in (False, True):
        world = world_of(mode, script, overlaps=overlaps)
        world.policies["rebase"] = Fickle()
        world.ask(algorithm="rebase", return_tree=True, speculate=speculate)
        world.run()
        world.assert_balanced()
        trees.append(tree_of(world))
    assert trees[0] == trees[1]
    told = figures(world)["speculation"]
    assert (told["leaves"], told["children"], told["children_used"]) == (2, 3, num_used)
    assert told["tokens_wasted"] > 0


# ---- rows ----


@pytest.mark.parametrize("mode", MODES)
def test_a_level_never_has_more_rows_than_nodes(mode: str) -> None:
    seen = [0]

    def look(world: World) -> None:
        for live in world.ets.searches.values():
            level = live.search._level
            running = sum(node.finish is None and node.state == "open" for node in level)
            assert running + live.guesses.num_running <= max(1, len(level))
            seen[0] = max(seen[0], live.guesses.num_running)

    guessed(asked_in_loop(world_of(mode)), look, width=16)
    assert seen[0] > 1


def with_guesses(world: World) -> Any:
    """The ticks of a search, at one after which it has guesses that run; it may not be the first that was asked for."""
    ticks = asked(asked_in_loop(world), width=16, speculate=True).ticks()
    *_, live = world.ets.searches.values()
    while not live.guesses.num_running:
        next(ticks)
    return ticks


def test_guesses_give_way_to_an_ordinary_request_that_finds_no_room() -> None:
    world = world_of("shared", pool_tokens=2_000)
    ticks = with_guesses(world)
    guesses = world.live().guesses
    plain = request("plain", "x", search=False, max_new_tokens=2_000 - 20)
    world.scheduler.add(plain)
    next(ticks)
    assert (guesses.num_running, guesses.members, guesses.holds()) == (0, {}, [])
    num_children = guesses.num_children
    while world.ets.searches:
        assert guesses.num_children == num_children or plain not in world.scheduler.waiting_queue
        next(ticks, None)
    while not plain.finished():
        world.scheduler.tick()
    world.assert_balanced()
    assert tree_of(world) == tree_of(grown(world_of("shared"), width=16))


def test_an_ordinary_request_that_finds_room_ends_no_guess() -> None:
    world = world_of("shared")
    ticks = with_guesses(world)
    before = dict(world.live().guesses.members)
    world.scheduler.add(request("plain", "x", search=False, max_new_tokens=5))
    next(ticks)
    assert before.keys() <= world.live().guesses.members.keys()
    for _ in ticks:
        pass


def test_nothing_is_guessed_while_another_search_waits() -> None:
    world = world_of("shared")
    world.scheduler.server_args._ets["max_running"] = 1
    asked(asked_in_loop(world), width=16, speculate=True)
    world.ask("pb", search_width=16, algorithm="ets", speculate=True)
    world.run()
    world.assert_balanced()
    assert figures(world)["speculation"]["children"] == 0
    assert world.answer("pb")["search"]["speculation"]["children"] > 0, "it was alone at the end"


def test_nothing_is_guessed_while_steps_wait_for_rows() -> None:
    world = world_of("shared")
    world.scheduler.server_args._ets["max_running_steps"] = 2

    def look(world: World) -> None:
        assert world.ets._steps.num_inside <= 2

    guessed(world, look, width=8)
    assert tree_of(world) == tree_of(grown(world_of("decode"), width=8))
    assert figures(world)["speculation"]["children"] <= 8


def test_a_search_that_gave_up_kv_guesses_no_more() -> None:
    world = world_of("shared")
    ticks = with_guesses(world)
    live = world.live()
    world.ets._release(live, 10**6)
    assert (live.guesses.num_running, live.guesses.members, live.guesses.holds()) == (0, {}, [])
    num_children = live.guesses.num_children
    for _ in ticks:
        pass
    world.assert_balanced()
    assert figures(world)["speculation"]["children"] == num_children
    assert tree_of(world) == tree_of(grown(world_of("shared"), width=16))


def test_two_searches_guess_beside_each_other() -> None:
    alone = grown(world_of("shared"), width=16)
    world = asked(asked_in_loop(world_of("shared")), width=16, speculate=True)
    world.ask("pb", "Q: 2+2?\n", search_width=16, algorithm="rebase", speculate=True)
    world.run()
    world.assert_balanced()
    assert tree_of(world) == tree_of(alone)
    assert all(world.answer(rid)["search"]["speculation"]["children"] for rid in ("pa", "pb"))


# ---- what goes wrong ----


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("act", [retract_one, release_all])
@pytest.mark.parametrize("algorithm", ["ets", "dvts"])
def test_a_tree_is_the_same_though_memory_runs_short(
    algorithm: str, act: Callable[[World], None], overlaps: bool
) -> None:
    calm = grown(world_of("decode"), algorithm=algorithm)
    for num in (5, 7) if overlaps else (2, 3, 7):
        for mode in ("shared", "decode"):
            world = guessed(asked_in_loop(world_of(mode, overlaps=overlaps)), every(num, act), algorithm=algorithm)
            assert tree_of(world) == tree_of(calm)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pool_tokens", [250, 400])
def test_a_small_pool_ends_balanced(pool_tokens: int, mode: str) -> None:
    world = guessed(world_of(mode, pool_tokens=pool_tokens), max_new_tokens=60)
    assert tree_of(world) == tree_of(grown(world_of("decode"), max_new_tokens=60))


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("mode", ["shared", "extend"])
def test_an_abort_at_any_tick_leaves_nothing(mode: str, overlaps: bool) -> None:
    num_ticks = sum(1 for _ in asked(asked_in_loop(world_of(mode, overlaps=overlaps)), speculate=True).ticks())
    for tick in range(0, num_ticks - 1, 3):
        world = asked(asked_in_loop(world_of(mode, overlaps=overlaps)), speculate=True)
        for now in world.ticks():
            if now == tick and world.ets.searches:
                world.scheduler.abort_request(AbortReq(rid="pa"))
        world.assert_balanced()


def test_a_deadline_at_any_tick_leaves_nothing() -> None:
    for tick in range(14):
        for overlaps in (False, True):
            world = asked_in_loop(world_of("shared", overlaps=overlaps))
            ended_by_deadline(world, tick, speculate=True)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_fails_fails_as_a_guess_too(mode: str, overlaps: bool) -> None:
    """Logits that are not finite: the guess fails, and so does the child that selection makes at its place."""

    def script(child: Any) -> Sequence[int]:
        drawn = list(steps_of_two_letters(child))
        return [*drawn[:2], VOCAB] if bytes(drawn[:2]) == b"ab" else drawn

    world = guessed(world_of(mode, script, overlaps=overlaps), width=16, algorithm="rebase")
    without = grown(world_of(mode, script, overlaps=overlaps), width=16, algorithm="rebase")
    assert same(world) == same(without)
    assert "failed" in {node["state"] for node in tree_of(world)["nodes"] if node["depth"] > 1}
    assert figures(world)["speculation"]["children_used"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_guess_that_the_engine_ends_begins_again(mode: str) -> None:
    world = world_of(mode)
    ticks = with_guesses(world)
    guesses = [req for req in world.scheduler.running_batch.reqs if req.rid in world.live().guesses.children]
    assert guesses and all(isinstance(req, ChildReq) for req in guesses)
    for req in guesses:
        req.to_finish = FINISH_ABORT("no memory")
    for _ in ticks:
        pass
    world.assert_balanced()
    assert tree_of(world) == tree_of(grown(world_of(mode), width=16))


@pytest.mark.parametrize("mode", MODES)
def test_a_guess_that_nobody_wants_and_that_is_taken_back_ends_with_its_search(mode: str) -> None:
    """In one plan: given up while it runs, retracted before its next token, and its search suspended."""
    world = world_of(mode)
    world.ask("older", "Q: 2+2?\n", search_width=4, max_step_tokens=12)
    ticks = with_guesses(world)
    live = next(live for live in world.ets.searches.values() if live.rid == "pa")
    world.ets._speculation.give_up(live)
    given_up = [req for req in world.scheduler.running_batch.reqs if req.rid in live.guesses.children]
    assert given_up
    world.scheduler.waiting_queue += [world.scheduler.retract(req) for req in given_up]
    world.ets._suspend_youngest()
    assert set(world.ets._steps.pending(live.id)) >= set(given_up)
    world.scheduler.abort_request(AbortReq(rid="pa"))
    for _ in ticks:
        pass
    world.assert_balanced()


def test_a_prm_that_breaks_fails_the_search_and_leaves_nothing() -> None:
    def score_of(job: ScoreJob) -> float:
        if job.depth == 2:
            raise RuntimeError("the PRM broke")
        return len(job.step_ids) / 20

    world = World(world_of("shared").scheduler, ScriptedPrm(score_of))
    for _ in asked(world, width=16, speculate=True).ticks():
        pass
    assert "the PRM broke" in world.error()
    world.assert_balanced()


def test_streams_report_the_same_with_and_without() -> None:
    def reported(**fields: Any) -> list[Any]:
        world = grown(world_of("shared"), width=16, stream=True, algorithm="rebase", **fields)
        reports = [report[PROGRESS_KEY] for report in world.scheduler.output_streamer.reports("pa")]
        return [{**report, "kv_held_tokens": None} for report in reports]  # what guesses hold is among them

    reports = reported(speculate=True)
    assert len(reports) > 1
    assert reports == reported()


def test_steps_are_scored_in_parts_only_for_a_search_that_guesses() -> None:
    batches = [len(grown(world_of("decode"), width=16, speculate=speculate).prm.batches) for speculate in (False, True)]
    assert batches[0] < batches[1]


def test_the_default_is_to_wait() -> None:
    scheduler = FakeScheduler()
    world = World(scheduler)
    world.ask(search_width=4)
    world.run()
    assert figures(world)["speculation"] is None
