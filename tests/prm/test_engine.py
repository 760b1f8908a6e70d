"""The PRM engine in one process: pressure, limits, faults. Whatever happens, no lock, row or slot is left behind."""

from __future__ import annotations

import logging
import math
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache import allocation
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_ets.kv import LedgerImbalance, RadixLedger
from sglang_ets.prm import engine as engine_module
from sglang_ets.prm import pool as pool_module
from sglang_ets.prm import readout as readout_module
from sglang_ets.prm.engine import PrmEngine
from sglang_ets.prm.pool import PoolImbalance
from sglang_ets.prm.sizing import PoolNeed
from sglang_ets.prm.steps import PrmError, PrmPath, ScoreJob
from sglang_ets.prm.stream import ForwardStream
from tests.prm.conftest import MODELS, TOKENIZER, changed_config
from tests.prm.streams import Streams

LARGE, SMALL = 4000, 60
QUESTION = "7*8-2*(3+4)=\n"
PROMPT = tuple(TOKENIZER.encode(QUESTION))
STEPS = ("7*8=56\n", "3+4=7\n", "2*7=14\n", "7*8=55\n")
Load = Callable[..., PrmEngine]
close_to = partial(pytest.approx, rel=1e-3, abs=1e-12)  # the scores of wrong steps are tiny; none is compared with zero


@pytest.fixture(scope="module")
def large(load_engine: Load) -> PrmEngine:
    return load_engine(LARGE)


@pytest.fixture(scope="module")
def small(load_engine: Load) -> PrmEngine:
    """Takes one trajectory of four steps, and little else."""
    return load_engine(SMALL)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test, the engines it used hold nothing, and their accounts balance."""
    engines = [request.getfixturevalue(name) for name in ("large", "small") if name in request.fixturenames]
    yield
    for engine in engines:
        assert_empty(engine)


def assert_empty(engine: PrmEngine) -> None:
    pool = engine._pool
    engine.check()
    assert engine.stats()["locks"] == 0
    assert pool._cache.protected_size() == 0
    assert pool._rows.available_size() == pool._rows.size
    pool.reset()
    assert pool._allocator.available_size() == pool.size


def job(parent: PrmPath, text: str, depth: int, parent_score: float | None = None) -> ScoreJob:
    return ScoreJob(parent, parent_score, tuple(TOKENIZER.encode(text)), text, depth)


def grow(
    engine: PrmEngine, owner: str, levels: int = 3, texts: Sequence[str] = STEPS
) -> tuple[list[float], list[PrmPath]]:
    """Scores of a whole tree that branches at every level like a search, and the paths still held: root and last level."""
    root = engine.open_prompt(PROMPT, QUESTION, owner)
    parents: list[tuple[PrmPath, float | None]] = [(root, None)]
    scores = []
    for depth in range(1, levels + 1):
        jobs = [job(path, text, depth, score) for path, score in parents for text in texts]
        children = scored(engine.score(jobs))
        scores += [score for _, score in children]
        engine.drop([path for path, _ in parents if path is not root])
        engine.drop([path for path, _ in children[2:]])
        parents = list(children[:2])
    return scores, [root, *(path for path, _ in parents)]


def scored(outcomes: Sequence[Any]) -> list[tuple[PrmPath, float]]:
    assert not [outcome for outcome in outcomes if isinstance(outcome, PrmError)]
    return [(path, score.score) for score, path in outcomes]


def end(engine: PrmEngine, owner: str, paths: Sequence[PrmPath]) -> None:
    engine.drop(paths)
    engine.end_owner(owner)


# ---- a pool that is too small ----


def test_a_small_pool_fails_no_step_and_changes_no_score(large: PrmEngine, small: PrmEngine) -> None:
    expected, paths = grow(large, "a")
    end(large, "a", paths)
    trees = {owner: grow(small, owner) for owner in ("a", "b", "c")}
    for scores, _ in trees.values():
        assert scores == close_to(expected)
    assert small.num_releases("a") > 0
    assert small.stats()["locks_given_up"] >= sum(small.num_releases(owner) for owner in trees)
    assert large.num_releases("a") == 0
    for owner, (_, paths) in trees.items():
        end(small, owner, paths)
    assert small.num_releases("a") == 0


def test_paths_without_their_lock_are_computed_again(large: PrmEngine, small: PrmEngine) -> None:
    _, kept = grow(large, "a")
    expected = scored(large.score([job(path, "5*5=25\n", 4, 0.5) for path in kept[1:]]))
    _, paths = grow(small, "a")
    assert small.num_releases("a") > 0
    small._pool.reset()
    again = scored(small.score([job(path, "5*5=25\n", 4, 0.5) for path in paths[1:]]))
    assert [score for _, score in again] == close_to([score for _, score in expected])
    end(large, "a", [*kept, *(path for path, _ in expected)])
    end(small, "a", [*paths, *(path for path, _ in again)])


def test_what_is_forgotten_is_computed_again(large: PrmEngine) -> None:
    """After a change of weights nothing may be read from the cache."""
    before = large.stats()["tokens_extended"]
    path = large.open_prompt(PROMPT, "")
    computed = large.stats()["tokens_extended"] - before
    large.release(path)
    large.release(again := large.open_prompt(PROMPT, ""))
    assert large.stats()["tokens_extended"] - before < 2 * computed
    before = large.stats()["tokens_extended"]
    large.forget()
    large.release(large.open_prompt(PROMPT, ""))
    assert large.stats()["tokens_extended"] - before == computed
    large.drop([path, again])
    end(large, "prm", [])


def test_the_youngest_search_gives_up_first_and_only_what_is_needed(
    small: PrmEngine, caplog: pytest.LogCaptureFixture
) -> None:
    roots = {owner: small.open_prompt(PROMPT, QUESTION, owner) for owner in ("old", "young", "youngest")}
    paths = {owner: small.score([job(roots[owner], text, 1)])[0][1] for owner, text in zip(roots, STEPS, strict=False)}
    free = small._pool.free_tokens
    with caplog.at_level(logging.WARNING, logger="sglang_ets.prm.valve"):
        (made,) = scored(small.score([job(paths["old"], "1+" * (free // 2) + "1\n", 2, 0.5)]))
    assert [small.num_releases(owner) for owner in roots] == [0, 0, 1]
    assert not paths["youngest"].hold.locked
    assert roots["youngest"].hold.locked
    assert [record.args for record in caplog.records] == [("youngest",)]
    small.drop([made[0]])
    for owner, root in roots.items():
        end(small, owner, [root, paths[owner]])


def test_a_search_is_named_in_the_log_once(small: PrmEngine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sglang_ets.prm.valve"):
        _, paths = grow(small, "a")
    assert small.num_releases("a") > 1
    assert len(caplog.records) == 1
    end(small, "a", paths)


def test_a_common_prefix_that_was_given_up_is_computed_once(large: PrmEngine) -> None:
    _, paths = grow(large, "a")
    large._pool.reset()
    before = large.stats()["tokens_extended"]
    made = scored(large.score([job(paths[1], f"{number}*1={number}\n", 4, 0.5) for number in range(10, 18)]))
    computed = large.stats()["tokens_extended"] - before
    assert computed < len(paths[1].token_ids) + 8 * 16
    end(large, "a", [*paths, *(path for path, _ in made)])


@pytest.mark.parametrize(("page_size", "is_later"), [(1, True), (16, True), (64, False)])
def test_tokens_that_fill_no_page_are_not_waited_for(page_size: int, is_later: bool) -> None:
    """Nothing smaller than a page is ever cached, so siblings that share less go into one pass."""
    pool = pool_module.PrmPool.__new__(pool_module.PrmPool)
    pool._cache = SimpleNamespace(page_size=page_size)
    chosen, other = (
        SimpleNamespace(origin_input_ids=array("q", [*range(40), last]), reuse_tokens=40, prefix_len=0)
        for last in (50, 51)
    )
    assert pool._is_better_later(other, [chosen]) is is_later
    assert not pool._is_better_later(other, [])


def test_a_step_fails_only_if_it_alone_does_not_fit(small: PrmEngine) -> None:
    root = small.open_prompt(PROMPT, QUESTION, "a")
    outcomes = small.score([job(root, STEPS[0], 1), job(root, "1+" * SMALL, 1), job(root, STEPS[1], 1)])
    assert [isinstance(outcome, PrmError) for outcome in outcomes] == [False, True, False]
    assert str(outcomes[1]) == (
        f"the trajectory has {len(PROMPT) + 2 * SMALL} tokens for the PRM, whose KV pool takes {SMALL - 1}; lower max_tokens "
        "or raise --prm-max-total-tokens"
    )
    assert small.num_releases("a") == 0
    exact = SMALL - 1 - len(PROMPT)
    fits = ScoreJob(root, 0.5, tuple(TOKENIZER.encode("1" * exact)), "1" * exact, 1)
    assert len(root.token_ids) + len(fits.step_ids) == SMALL - 1
    made = scored(small.score([fits]))
    end(small, "a", [root, *(outcome[1] for outcome in (outcomes[0], outcomes[2])), made[0][0]])


def test_a_prompt_that_does_not_fit_says_so(small: PrmEngine) -> None:
    with pytest.raises(PrmError, match="the prompt has 60 tokens for the PRM, whose KV pool takes 59"):
        small.open_prompt(PROMPT * 4 + PROMPT[:8], QUESTION, "a")
    refusal = small.refusal(PROMPT, QUESTION, 50)
    assert refusal == (
        "one trajectory may have 63 tokens (prompt 13 + max_tokens 50) for the PRM, whose KV pool takes 59; lower max_tokens "
        "or raise --prm-max-total-tokens"
    )
    assert small.refusal(PROMPT, QUESTION, 46) is None


# ---- limits ----


@pytest.fixture(scope="module")
def short(load_engine: Load, tmp_path_factory: pytest.TempPathFactory) -> PrmEngine:
    folder = tmp_path_factory.mktemp("short") / "prm"
    shutil.copytree(MODELS / "prm", folder)
    with changed_config(folder, max_position_embeddings=64):
        return load_engine(LARGE, folder)


def test_the_context_is_a_limit_at_admission_and_of_a_trajectory(short: PrmEngine) -> None:
    assert short.refusal(PROMPT, QUESTION, 51) is None
    assert short.refusal(PROMPT, QUESTION, 52) == (
        "one trajectory may have 65 tokens (prompt 13 + max_tokens 52) for the PRM, whose context is 64; lower max_tokens or "
        "shorten the prompt"
    )
    with pytest.raises(PrmError, match="the prompt has 65 tokens for the PRM, whose context is 64"):
        short.open_prompt(PROMPT * 5, QUESTION, "a")
    root = short.open_prompt(PROMPT, QUESTION, "a")
    outcomes = short.score([job(root, "1" * 51, 1), job(root, "1" * 52, 1)])
    assert isinstance(outcomes[1], PrmError)
    assert "the trajectory has 65 tokens for the PRM, whose context is 64" in str(outcomes[1])
    end(short, "a", [root, scored(outcomes[:1])[0][0]])
    assert_empty(short)


def test_no_pass_is_larger_than_a_batch_may_be(large: PrmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = (PROMPT * 8)[:100]
    expected = scored(large.score([job(large.open_prompt(prompt, QUESTION, "a"), STEPS[0], 1)]))[0][1]
    large._pool.reset()
    large.end_owner("a")
    passes: list[int] = []
    forward = ModelRunner.forward

    def counted(runner: ModelRunner, batch: Any) -> Any:
        passes.append(len(batch.input_ids))
        return forward(runner, batch)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    for module in (engine_module, pool_module):
        monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 16)
    root = large.open_prompt(prompt, QUESTION, "a")
    large._pool.reset()  # the score needs the prompt again
    made = scored(large.score([job(root, STEPS[0], 1)]))
    assert made[0][1] == close_to(expected)
    assert len(passes) >= 2 * math.ceil(100 / 16)
    assert max(passes) <= 16 + 1
    end(large, "a", [root, made[0][0]])


# ---- identical steps ----


def test_identical_steps_share_the_work_but_not_the_lock(large: PrmEngine) -> None:
    roots = [large.open_prompt(PROMPT, QUESTION, owner) for owner in ("a", "b")]
    before = large.stats()["tokens_extended"]
    made = scored(large.score([job(root, STEPS[0], 1) for root in roots for _ in range(2)]))
    assert large.stats()["tokens_extended"] - before == len(TOKENIZER.encode(STEPS[0])) + 1
    assert [path.owner for path, _ in made] == ["a", "a", "b", "b"]
    assert len({id(path.hold) for path, _ in made}) == 4
    end(large, "a", [roots[0], *(path for path, _ in made[:2])])
    assert made[2][0].hold.locked
    end(large, "b", [roots[1], *(path for path, _ in made[2:])])


def test_the_same_text_in_other_steps_has_its_own_score(large: PrmEngine) -> None:
    root = large.open_prompt(PROMPT, QUESTION, "a")
    whole, half = STEPS[0] + STEPS[1], scored(large.score([job(root, STEPS[0], 1)]))[0][0]
    together = [
        path_score[1] for path_score in scored(large.score([job(root, whole, 1), job(half, STEPS[1], 2, 0.01)]))
    ]
    alone = [scored(large.score([one]))[0][1] for one in (job(root, whole, 1), job(half, STEPS[1], 2, 0.01))]
    assert together == close_to(alone)
    assert alone[0] != close_to(alone[1])
    large._pool.reset()
    large.end_owner("a")


# ---- steps without text: cut inside a character, or only the end of the text ----


def test_a_step_without_text_keeps_the_score_of_its_trajectory(
    large: PrmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "_has_policy_tokens", False)
    root = large.open_prompt(PROMPT, QUESTION, "a")
    (parent, parent_score), (_, other) = made = scored(large.score([job(root, text, 1) for text in STEPS[:2]]))
    jobs = [job(parent, "", 2, parent_score), job(parent, STEPS[1], 2, parent_score), job(root, STEPS[1], 1)]
    empty, *rest = large.score(jobs)
    ((path, score),) = scored([empty])
    assert score == parent_score
    assert path.token_ids == parent.token_ids
    assert empty[0].embedding @ empty[0].embedding == pytest.approx(1.0, abs=1e-5)
    assert scored(rest)[1][1] == close_to(other), "the steps beside it are scored as without it"
    assert scored(large.score([job(path, STEPS[1], 3, score)]))[0][1] == close_to(scored(rest)[0][1])
    large._pool.reset()
    assert len(made) == 2
    large.end_owner("a")


def test_a_first_step_without_text_has_nothing_to_score(large: PrmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_has_policy_tokens", False)
    root = large.open_prompt(PROMPT, QUESTION, "a")
    empty, (_, path) = large.score([job(root, "", 1), job(root, STEPS[0], 1)])
    assert isinstance(empty, PrmError)
    assert str(empty) == "the first step has no text that the PRM could read"
    end(large, "a", [root, path])


# ---- faults ----


class Fault(Exception):
    """Raised by a test in the middle of the engine."""


def failing(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> None:
    """The `call`-th call raises."""
    original, calls = getattr(place, name), count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise Fault(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, wrapped)


def fault_places() -> dict[str, tuple[Any, str, int]]:
    return {
        "a request is made": (pool_module.PrmPool, "_request", 1),
        "rows are taken": (allocation, "alloc_token_slots", 0),
        "slots are taken": (allocation, "write_cache_indices", 0),
        "the batch is ready": (ScheduleBatch, "prepare_for_extend", 0),
        "the forward pass": (ModelRunner, "forward", 0),
        "the second request is released": (pool_module, "release_kv_cache", 1),
        "the second lock": (RadixLedger, "hold", 1),
        "the readout": (engine_module, "read_steps", 0),
    }


@pytest.mark.parametrize("when", fault_places())
@pytest.mark.parametrize("is_second_pass", [False, True])
def test_whatever_raises_leaves_nothing_behind(
    large: PrmEngine, monkeypatch: pytest.MonkeyPatch, when: str, is_second_pass: bool
) -> None:
    root = large.open_prompt(PROMPT, QUESTION, "a")
    jobs = [job(root, text, 1) for text in STEPS]
    expected = [score for _, score in scored_and_dropped(large, jobs)]
    place, name, call = fault_places()[when]
    with monkeypatch.context() as patch:
        if is_second_pass:  # two steps a pass: the paths of the first pass are locked when the second one fails
            patch.setattr(pool_module, "MAX_BATCH_TOKENS", 20)
            per_pass = {"_request": 3, "release_kv_cache": 2, "hold": 2}
            call += per_pass.get(name, 1)
        failing(patch, place, name, call)
        with pytest.raises(Fault):
            large.score(jobs)
    large.check()
    assert large.stats()["locks"] == root.hold.locked
    assert large._pool._cache.protected_size() == len(PROMPT) * root.hold.locked
    assert [score for _, score in scored_and_dropped(large, jobs)] == close_to(expected)
    end(large, "a", [root])


def scored_and_dropped(engine: PrmEngine, jobs: Sequence[ScoreJob]) -> list[tuple[PrmPath, float]]:
    made = scored(engine.score(jobs))
    engine.drop([path for path, _ in made])
    return made


def test_a_prompt_that_raises_leaves_nothing_behind(large: PrmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH_TOKENS", 5)
    with monkeypatch.context() as patch:
        failing(patch, pool_module, "release_kv_cache", 1)
        with pytest.raises(Fault):
            large.open_prompt(PROMPT, QUESTION, "a")
    large.end_owner("a")


def test_a_model_that_gives_nan_fails_the_steps_with_a_reason(large: PrmEngine) -> None:
    root = large.open_prompt(PROMPT, QUESTION, "a")
    weight = large._worker.model_runner.model.model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[3] = math.nan
    outcomes = large.score([job(root, text, 1, 0.5) for text in STEPS])
    with torch.no_grad():
        weight.copy_(before)
    assert [str(outcome) for outcome in outcomes] == [
        "the PRM's score of the step is nan, no finite number; check its checkpoint, dtype and quantization"
    ] * 4
    assert large.stats()["locks"] == 1
    end(large, "a", [root, *(path for path, _ in scored(large.score([job(root, STEPS[0], 1)])))])


def test_a_search_that_ends_with_locks_is_a_bug(large: PrmEngine) -> None:
    large.open_prompt(PROMPT, QUESTION, "a")
    with pytest.raises(LedgerImbalance, match="search a ended with 1 locks on 13 KV tokens"):
        large.end_owner("a")


def test_lost_slots_are_found_when_the_last_search_ends(large: PrmEngine) -> None:
    roots = [large.open_prompt(PROMPT, QUESTION, owner) for owner in ("a", "b")]
    large._pool._allocator.alloc(7)
    end(large, "a", roots[:1])
    large.drop(roots[1:])
    with pytest.raises(
        PoolImbalance, match=rf"{LARGE - 7} tokens available \+ 0 evictable \+ 0 protected .* expected {LARGE}"
    ):
        large.end_owner("b")
    large.check()


def test_lost_rows_and_locks_of_nobody_are_found(large: PrmEngine) -> None:
    pool = large._pool
    pool._rows.alloc_rows(1)
    with pytest.raises(PoolImbalance, match=f"{pool._rows.size - 1} rows free, expected {pool._rows.size}"):
        large.check()
    root = large.open_prompt(PROMPT, QUESTION, "a")
    pool._cache.lock(root.hold.node)
    large.release(root)
    with pytest.raises(PoolImbalance, match="13 protected by 0 locks"):
        large.end_owner("a")


# ---- the size of the pool ----


def test_without_a_flag_the_pool_follows_width_and_limits(
    load_engine: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    per_token = 4 * 2 * (64 + 64) * 4  # layers, heads, key and value, float32
    with caplog.at_level(logging.INFO, logger="sglang_ets.prm.engine"):
        assert load_engine(None, need=PoolNeed(8, 50))._pool.size == 9 * 50
    assert "context of 1024 tokens, KV pool of 450 tokens (0.00 GB)" in caplog.text
    monkeypatch.setattr(engine_module, "pool_budget", lambda: 300 * per_token)
    assert load_engine(None, need=PoolNeed(8, 50))._pool.size == 300
    monkeypatch.setattr(engine_module, "pool_budget", lambda: 50 * per_token)
    with pytest.raises(SystemExit, match=r"needs more than 50 tokens .* holds 50; lower --search-max-tokens"):
        load_engine(None, need=PoolNeed(8, 50))


# ---- the start, and the stream ----


def test_a_step_is_scored_before_the_first_search_and_leaves_nothing(
    load_engine: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what is compiled at its first use is compiled then."""
    pooled: list[int] = []
    kernel = readout_module.step_pool

    def watched(hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        pooled.append(len(offsets) - 1)
        return kernel(hidden, offsets)

    monkeypatch.setattr(readout_module, "step_pool", watched)
    engine = load_engine(LARGE)
    assert pooled == [1]
    assert (engine.stats()["tokens_extended"], engine.stats()["tokens_if_rescored"]) == (0, 0)
    assert engine._pool.free_tokens == engine._pool.size and engine._valve.is_idle
    assert_empty(engine)


def test_forward_passes_run_in_the_order_of_the_policy_models(
    large: PrmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the overlap schedule, both models would use the workspace of the all-reduce at once otherwise."""
    streams = Streams(enable_overlap=True)
    forward = ModelRunner.forward
    monkeypatch.setattr(large, "_stream", ForwardStream(streams))
    monkeypatch.setattr(ModelRunner, "forward", lambda *a: (streams.events.append("forward"), forward(*a))[1])
    path = large.open_prompt(PROMPT, QUESTION)
    order = ["on forward", "forward waits for schedule", "forward", "off forward", "schedule waits for forward"]
    assert streams.events == order
    streams.events.clear()
    (outcome,) = large.score([job(path, STEPS[0], 1)])
    assert streams.events == order
    large.drop([path, scored([outcome])[0][0]])
    large.end_owner("prm")
