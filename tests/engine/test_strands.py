"""Shared decoding: trees are those of a row per node, whatever happens to a strand, and no token is computed twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers import sampler
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang_ets.patches.cpu_sampler import draw_by_seed, row_seeds, sample_rows

from bench.trees import num_distinct_prefixes
from sglang_ets.core.registry import BUILT_IN
from sglang_ets.engine.children import ChildReq, ChildSpec, SearchIds, make_child
from sglang_ets.engine.strands import DRAW_KEY, Draw, can_share, run_batch, take_awaited
from sglang_ets.wire import PROGRESS_KEY
from tests.engine.fakes import DELIMITER, VOCAB, FakeScheduler, World, given, request, tokens

ALGORITHMS = tuple(BUILT_IN)
MODES = ("shared", "decode", "extend")


def steps_of_two_letters(child: Any) -> Sequence[int]:
    """A step is drawn letter by letter from the child's seed: siblings agree for a while and part, or end together."""
    rng = random.Random(child.sampling_params.sampling_seed)
    letters = []
    while True:
        letter = rng.choice("aaab")
        letters.append(letter)
        if len(letters) >= 2 and rng.random() < 0.3:
            is_end = rng.random() < 0.2
            return tokens("".join(letters), ends=True) if is_end else tokens("".join(letters) + DELIMITER)
        if len(letters) == 12:
            return tokens("".join(letters))


def world_of(mode: str, script: Any = steps_of_two_letters, pool_tokens: int = 20_000, **traits: Any) -> World:
    scheduler = FakeScheduler(script, pool_tokens=pool_tokens, tokens_per_tick=1)
    scheduler.server_args._ets["forks"] = mode
    for name, value in traits.items():
        setattr(scheduler, name, value)
    return World(scheduler)


def asked(world: World, width: int = 8, **fields: Any) -> World:
    wanted = {"algorithm": "ets", "return_tree": True, "n": width, "max_step_tokens": 12, "seed": 3, **fields}
    world.ask(search_width=width, **wanted)
    return world


def grown(world: World, while_running: Callable[[World], None] = lambda _world: None, **fields: Any) -> World:
    for _ in asked(world, **fields).ticks():
        while_running(world)
    world.assert_balanced()
    return world


def tree_of(world: World) -> Any:
    return world.answer()["tree"]


WIDE = [(algorithm, 64) for algorithm in ("ets", "best_of_n", "dvts")]


@pytest.mark.parametrize(("algorithm", "width"), [*itertools.product(ALGORITHMS, (4, 16)), *WIDE])
def test_trees_are_those_of_a_row_per_node(algorithm: str, width: int) -> None:
    trees = {mode: tree_of(grown(world_of(mode), width=width, algorithm=algorithm)) for mode in MODES}
    assert trees["shared"] == trees["decode"] == trees["extend"]
    assert max(node["depth"] for node in trees["shared"]["nodes"]) > 1


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "subpool"])  # whose revived leaves are
def test_no_token_is_computed_twice(algorithm: str, overlaps: bool) -> None:
    world = grown(world_of("shared", overlaps=overlaps), width=16, algorithm=algorithm)
    figures, usage = world.answer()["search"], world.answer()["usage"]
    distinct = num_distinct_prefixes(tree_of(world)["nodes"])
    assert figures["tokens_computed"] <= 1.05 * distinct < usage["completion_tokens"]
    assert figures["forks"] == "shared"
    assert len(world.scheduler.prefilled) == 1
    alone = grown(world_of("decode", overlaps=overlaps), width=16, algorithm=algorithm)
    assert tree_of(alone) == tree_of(world)
    assert alone.answer()["search"]["tokens_computed"] >= usage["completion_tokens"]


def test_steps_that_end_together_are_one_step_in_one_call_of_the_prm() -> None:
    world = grown(
        world_of("shared", lambda child: tokens("same\n") if len(given(child)) < 12 else tokens("x", ends=True))
    )
    nodes = tree_of(world)["nodes"]
    assert len({node["score"] for node in nodes if node["depth"] == 1}) == 1
    assert world.prm.batches[0] == ["same\n"] * 8
    assert world.answer()["search"]["tokens_computed"] == len("same\n") + len("x") + 1


def every(num: int, act: Callable[[World], None]) -> Callable[[World], None]:
    count = [0]

    def when_due(world: World) -> None:
        count[0] += 1
        if count[0] % num == 0:
            act(world)

    return when_due


def retract_one(world: World) -> None:
    running = [req for req in world.scheduler.running_batch.reqs if isinstance(req, ChildReq) and not req.finished()]
    if running:
        world.scheduler.retracted.append(world.scheduler.retract(running[-1]))


def release_all(world: World) -> None:
    for live in world.ets.searches.values():
        world.ets._release(live, 10**6)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("act", [retract_one, release_all])
@pytest.mark.parametrize("algorithm", ["ets", "best_of_n", "dvts"])
def test_a_tree_is_the_same_though_memory_runs_short(
    algorithm: str, act: Callable[[World], None], overlaps: bool
) -> None:
    calm = grown(world_of("decode"), algorithm=algorithm)
    for num in (5, 7) if overlaps else (2, 3, 7):
        world = grown(world_of("shared", overlaps=overlaps), every(num, act), algorithm=algorithm)
        assert tree_of(world) == tree_of(calm)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("max_running_steps", [1, 3])
def test_a_tree_is_the_same_though_few_rows_are_left(overlaps: bool, max_running_steps: int) -> None:
    world = world_of("shared", overlaps=overlaps)
    world.scheduler.server_args._ets["max_running_steps"] = max_running_steps
    assert tree_of(grown(world)) == tree_of(grown(world_of("decode")))


@pytest.mark.parametrize("pool_tokens", [250, 400])
def test_a_small_pool_ends_balanced(pool_tokens: int) -> None:
    for overlaps in (False, True):
        world = grown(world_of("shared", pool_tokens=pool_tokens, overlaps=overlaps), max_new_tokens=60)
        assert tree_of(world) == tree_of(grown(world_of("decode"), max_new_tokens=60))


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("algorithm", ["ets", "best_of_n"])
def test_an_abort_at_any_tick_leaves_nothing(algorithm: str, overlaps: bool) -> None:
    num_ticks = sum(1 for _ in asked(world_of("shared", overlaps=overlaps), algorithm=algorithm).ticks())
    for tick in range(0, num_ticks - 1, 2):
        world = asked(world_of("shared", overlaps=overlaps), algorithm=algorithm)
        for now in world.ticks():
            if now == tick and world.ets.searches:
                world.scheduler.abort_request(AbortReq(rid="pa"))
        if world.scheduler.output_streamer.responses("pa")[0].finished["type"] == "abort":  # type: ignore[index]
            assert "aborted" in world.error()
        world.assert_balanced()


def ended_by_deadline(world: World, tick: int, **fields: Any) -> Any:
    """What is answered if the time is up after so many ticks."""
    for now in asked(world, deadline_s=1e4, **fields).ticks():
        if now == tick:
            for live in world.ets.searches.values():
                live.started_s -= 1e5
    world.assert_balanced()
    (sent,) = world.scheduler.output_streamer.responses("pa")
    assert sent.finished is not None
    return sent.info.get("tree"), sent.finished["type"]


def test_a_deadline_at_any_tick_answers_with_what_all_members_have() -> None:
    for tick in range(12):
        tree, kind = ended_by_deadline(world_of("shared"), tick)
        assert (tree, kind) == ended_by_deadline(world_of("decode"), tick)
        assert (kind == "length") == (tick > 0)
        ended_by_deadline(world_of("shared", overlaps=True), tick)


@pytest.mark.parametrize("overlaps", [False, True])
def test_members_without_finite_logits_fail_and_the_others_go_on(overlaps: bool) -> None:
    def script(child: Any) -> Sequence[int]:
        drawn = steps_of_two_letters(child)
        return [*drawn[:2], VOCAB] if child.node_id in (2, 5) else drawn

    trees = []
    for mode in MODES:
        world = grown(world_of(mode, script, overlaps=overlaps), algorithm="rebase")
        trees.append(tree_of(world))
        failed = [node["id"] for node in trees[-1]["nodes"] if node["state"] == "failed"]
        assert failed == [2, 5]
    assert trees[0] == trees[1] == trees[2]


def test_a_strand_that_fails_takes_its_members_along() -> None:
    world = asked(world_of("shared"), algorithm="rebase")
    ticks = world.ticks()
    while not (strands := [req for req in world.scheduler.running_batch.reqs if 1 < len(req.members) < 5]):
        next(ticks)
    strand = strands[0]
    members = strand.node_ids
    world.scheduler.running_batch.reqs.remove(strand)
    world.scheduler.release(strand)
    strand.to_finish = None
    assert world.ets.swallow_abort(strand)
    for _ in ticks:
        pass
    world.assert_balanced()
    failed = [node["id"] for node in tree_of(world)["nodes"] if node["state"] == "failed"]
    assert failed == sorted(members)


def test_streams_report_the_same_with_and_without() -> None:
    def reported(mode: str) -> list[str]:
        world = grown(world_of(mode), stream=True, algorithm="beam")
        return [report[PROGRESS_KEY]["text"] for report in world.scheduler.output_streamer.reports("pa")]

    texts = reported("shared")
    assert texts
    assert texts == reported("decode") == reported("extend")


# ---- the draw ----


def strand(num_members: int, place: int = 0) -> ChildReq:
    spec = ChildSpec(SearchIds().new(), request("pa", "Q"), 5, ("\n",))
    return make_child(spec, [spec.member(node, (place, node)) for node in range(1, num_members + 1)], (1, 2), 20)


def sampling_info(reqs: Sequence[Any]) -> SamplingBatchInfo:
    """Of rows that differ in every setting; row 0 is an ordinary request's with a state of its own."""
    num = len(reqs)
    return SamplingBatchInfo(
        temperatures=torch.arange(1, num + 1, dtype=torch.float32)[:, None],
        top_ps=torch.linspace(0.5, 0.9, num),
        top_ks=torch.arange(10, 10 + num, dtype=torch.int32),
        min_ps=torch.linspace(0.0, 0.1, num),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=True,
        vocab_size=VOCAB,
        sampling_seed=torch.tensor(row_seeds(reqs)),
        sampling_mask_batch_indices=torch.tensor([0]),
        has_custom_logit_processor=True,
        logit_bias=torch.ones(num, VOCAB),
    )


def hashed_draw(_sampler: Any, out: Any, info: Any, *_logprobs: Any) -> torch.Tensor:
    """A token of each row from all that the row draws with; as sglang's sampler, it destroys the logits."""
    positions = _logprobs[-1]
    seeds = info.sampling_seed if info.sampling_seed is not None else torch.zeros(len(positions), dtype=torch.int64)
    mixed = out.next_token_logits.sum(1) * info.temperatures[:, 0] + info.top_ps + info.top_ks + info.min_ps + positions
    out.next_token_logits.zero_()
    return (mixed * 1000).to(torch.int64) + seeds % VOCAB


@pytest.mark.parametrize("has_seeds", [True, False])
def test_members_draw_as_if_each_had_the_row_for_itself(has_seeds: bool) -> None:
    reqs = [request("plain", "x", search=False), strand(3), strand(1, 1), strand(2, 2)]
    draw = Draw.of(reqs)
    assert draw is not None
    logits, positions = torch.randn(4, VOCAB, generator=torch.manual_seed(0)), torch.tensor([7, 8, 9, 10])
    info = sampling_info(reqs)
    if not has_seeds:
        info.sampling_seed = None
    calls: list[Any] = []

    def original(sampler: Any, out: Any, given_info: Any, *rest: Any) -> Any:
        calls.append((given_info, rest[0]))
        return hashed_draw(sampler, out, given_info, *rest)

    drawn = draw.sample(
        original,
        None,
        LogitsProcessorOutput(next_token_logits=logits.clone()),
        info,
        True,
        [1] * 4,
        [None] * 4,
        positions,
    )
    rows = hashed_draw(None, LogitsProcessorOutput(next_token_logits=logits.clone()), info, positions)
    assert drawn.tolist() == rows.tolist(), "sglang draws the rows as ever"
    assert calls[0] == (info, True)
    assert calls[1][1] is False, "no log-probabilities of members"
    assert (calls[1][0].has_custom_logit_processor, calls[1][0].logit_bias) == (False, None), "applied already"
    for row in (1, 3):
        child = reqs[row]
        for member in child.members[1:]:
            alone = replace(info, sampling_seed=info.sampling_seed.clone() if has_seeds else None)
            if has_seeds:
                alone.sampling_seed[row] = member.seed
            expected = hashed_draw(None, LogitsProcessorOutput(next_token_logits=logits.clone()), alone, positions)
            assert draw.drawn(child)[member.node_id] == expected[row]


def by_seed(_sampler: Any, out: Any, info: Any, *rest: Any) -> torch.Tensor:
    """What sglang's sampler does for rows that may be cut, on a CPU with our hooks."""
    probs = (out.next_token_logits / info.temperatures).softmax(dim=1)
    out.next_token_logits.zero_()
    token_ids, _ = sample_rows(
        lambda _sampler, probs, *_: (probs.argmax(1).int(), None), None, probs, info, rest[-1], False
    )
    return token_ids


def test_drawn_at_once_the_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "multinomial_with_seed", partial(draw_by_seed, None))
    reqs = [request("plain", "x", search=False), strand(30), strand(1, 1), strand(9, 2)]
    logits, positions = torch.randn(4, VOCAB, generator=torch.manual_seed(0)), torch.tensor([7, 8, 9, 10])
    drawn: list[Any] = []
    for at_once in (False, True):
        draw, info = Draw.of(reqs), sampling_info(reqs)
        assert draw is not None
        calls = itertools.count()

        def original(*args: Any, calls: Any = calls) -> Any:
            next(calls)
            return by_seed(*args)

        out = LogitsProcessorOutput(next_token_logits=logits.clone())
        rows = draw.sample(original, None, out, info, False, [], [], positions, at_once=at_once)
        assert next(calls) == (1 if at_once else 2)
        assert info.sampling_seed.tolist() == row_seeds(reqs)
        drawn.append((rows.tolist(), [draw.drawn(reqs[row]) for row in (1, 3)]))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0][1][0].values())) > 3


def test_a_batch_without_members_is_sglangs_own() -> None:
    assert Draw.of([request("plain", "x", search=False), strand(1)]) is None
    assert run_batch(lambda: SimpleNamespace(), [strand(1)]).__dict__ == {}
    assert take_awaited() is None


@pytest.mark.parametrize("is_delayed", [False, True])
def test_a_draw_waits_for_its_sampler_and_for_no_other(is_delayed: bool) -> None:
    result = SimpleNamespace(delay_sample_func=(lambda: None) if is_delayed else None)
    ran = run_batch(lambda: result, [strand(2)])  # sampled later, or not at all
    assert take_awaited() is (getattr(ran, DRAW_KEY) if is_delayed else None)
    assert take_awaited() is None


def test_a_strand_that_nobody_drew_for_is_a_bug() -> None:
    child = strand(2)
    draw = Draw.of([child])
    assert draw is not None
    with pytest.raises(RuntimeError, match="1 strands were computed"):
        draw.drawn(child)


def test_members_share_a_row_only_with_the_sampler_of_sglang() -> None:
    scheduler = FakeScheduler()
    assert can_share(scheduler)
    scheduler.tp_worker.model_runner.sampler = SimpleNamespace()
    assert not can_share(scheduler)
