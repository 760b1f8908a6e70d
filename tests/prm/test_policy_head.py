"""A head on the policy model's own states: what it reads of a step, and which heads it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sglang_ets.prm.choose import CONFIG_FILE, is_policy_head
from sglang_ets.prm.policy_head import HEAD_FILE, LinearHead, PolicyHead
from sglang_ets.prm.steps import PrmError, PrmPath, SampledStates, ScoreJob
from tests.engine.test_decisions import First, Second

SCHEDULER = SimpleNamespace(
    model_config=SimpleNamespace(hidden_size=3, num_hidden_layers=8, context_len=64), max_total_num_tokens=500
)
HEAD = LinearHead(np.array([1.0, 0.0, -1.0]), 0.5)


def states_of(*rows: list[float]) -> SampledStates:
    made = SampledStates.first(np.array(rows[0], dtype=np.float32))
    for row in rows[1:]:
        made = made.plus(np.array(row, dtype=np.float32))
    return made


def job(path: PrmPath, *rows: list[float]) -> ScoreJob:
    return ScoreJob(path, None, tuple(range(len(rows))), "step", 1, states_of(*rows))


def test_a_score_is_read_where_the_last_token_was_chosen_and_an_embedding_is_the_mean() -> None:
    scorer = PolicyHead(HEAD, SCHEDULER)
    path = scorer.open_prompt((1, 2), "Q", "s1")
    first, second = scorer.score([job(path, [9, 0, 0], [1, 2, 0]), job(path, [0, 0, 4])])
    assert not isinstance(first, PrmError) and not isinstance(second, PrmError)
    assert first[0].score == pytest.approx(1 / (1 + np.exp(-1.5)))
    assert second[0].score == pytest.approx(1 / (1 + np.exp(3.5)))
    np.testing.assert_allclose(first[0].embedding, np.array([5, 1, 0]) / np.sqrt(26), rtol=1e-6)
    assert first[0].embedding.dtype == np.float32
    assert (first[1].token_ids, first[1].hold.locked, scorer.pool_tokens, scorer.drop([path])) == ((), False, 500, 0)
    assert scorer.refusal((1,) * 1000, "Q", 1000) is None


def test_states_of_a_step_are_no_part_of_the_batch_that_they_come_from() -> None:
    batch = np.ones((2, 3), dtype=np.float32)
    one = SampledStates.first(batch[0])
    two = one.plus(batch[1])
    batch[:] = 7
    assert (one.total.tolist(), one.last.tolist(), one.count) == ([1, 1, 1], [1, 1, 1], 1)
    assert (two.total.tolist(), two.last.tolist(), two.count) == ([2, 2, 2], [1, 1, 1], 2)


@pytest.mark.parametrize("broken", [[np.nan, 0.0, 0.0], [0.0, np.inf, 0.0]])
def test_what_is_no_number_is_an_error_of_this_step_alone(broken: list[float]) -> None:
    scorer = PolicyHead(HEAD, SCHEDULER)
    path = scorer.open_prompt((1,), "Q", "s1")
    bad, good = scorer.score([job(path, broken), job(path, [0, 0, 0])])
    assert isinstance(bad, PrmError) and "no finite number" in str(bad)
    assert not isinstance(good, PrmError)


def test_all_ranks_have_the_scores_of_the_first() -> None:
    said = SimpleQueue[Any]()
    other = LinearHead(HEAD.weight + 1e-3, HEAD.bias)
    scorers = [PolicyHead(HEAD, SCHEDULER, First(said)), PolicyHead(other, SCHEDULER, Second(said))]
    scores = [one.score([job(one.open_prompt((1,), "Q", "s"), [1, 2, 3])])[0] for one in scorers]
    assert scores[0][0].score == scores[1][0].score  # type: ignore[index, union-attr]


@pytest.mark.parametrize(("states", "count"), [(None, 0), (SampledStates.first(np.zeros(3, dtype=np.float32)), 1)])
def test_a_step_that_lacks_states_has_no_score_and_the_others_have_theirs(
    states: SampledStates | None, count: int
) -> None:
    scorer = PolicyHead(HEAD, SCHEDULER)
    path = scorer.open_prompt((1,), "Q", "s")
    bad, good = scorer.score([ScoreJob(path, None, (1, 2), "ab", 1, states), job(path, [1, 2, 3])])
    assert isinstance(bad, PrmError)
    assert f"a step of 2 tokens must bring a hidden state for each of them, got {count}" in str(bad)
    assert not isinstance(good, PrmError) and good[0].score == pytest.approx(1 / (1 + np.exp(1.5)))


def test_a_head_is_saved_and_recognised(tmp_path: Path) -> None:
    HEAD.save(tmp_path)
    loaded = LinearHead.load(str(tmp_path))
    assert (loaded.weight.tolist(), loaded.bias, loaded.layer) == (HEAD.weight.tolist(), HEAD.bias, None)
    replace(HEAD, layer=2).save(tmp_path)
    assert LinearHead.load(str(tmp_path)).layer == 2
    assert is_policy_head(str(tmp_path), "auto") and is_policy_head(str(tmp_path), "policy_head")
    assert not is_policy_head(str(tmp_path), "judge") and not is_policy_head(None, "judge")
    (tmp_path / CONFIG_FILE).unlink()
    assert not is_policy_head(str(tmp_path), "auto")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": np.zeros((2, 3), dtype=np.float32), "bias": np.zeros(1, dtype=np.float32)}, r"weight \[H\]"),
        ({"weight": np.zeros(3, dtype=np.float32)}, r"must hold weight \[H\] and bias \[1\], got \{'weight': \(3,\)\}"),
        ({"weight": np.zeros(4, dtype=np.float32), "bias": np.zeros(1, dtype=np.float32)}, "must have 3 weights"),
        (None, f"reads {HEAD_FILE} in the folder of --prm-model-path"),
    ],
)
def test_a_server_with_another_head_does_not_start(tensors: Any, said: str, tmp_path: Path) -> None:
    if tensors is not None:
        save_file(tensors, tmp_path / HEAD_FILE)
    with pytest.raises(SystemExit, match=said):
        PolicyHead.load(str(tmp_path), SCHEDULER, First(SimpleQueue()))


@pytest.mark.parametrize(
    ("layer", "said"),
    [(8, "must read a layer below the policy model's 8, got 8"), (0, "number of layers"), ("2", "'2'")],
)
def test_a_server_with_a_layer_that_is_none_does_not_start(layer: Any, said: str, tmp_path: Path) -> None:
    replace(HEAD, layer=layer).save(tmp_path)
    with pytest.raises(SystemExit, match=said):
        PolicyHead.load(str(tmp_path), SCHEDULER, First(SimpleQueue()))
