"""A head as `bench.testbed.prm_head` saves it, in a PRM engine: the scores that it was trained to give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from bench.testbed.prm_head import save
from bench.testbed.rollouts import Rollout
from bench.testbed.verifiers import CHECKPOINT, name_of, read
from sglang_ets.prm.policy_head import LinearHead
from sglang_ets.prm.steps import ScoreJob
from tests.prm.conftest import MODELS, TOKENIZER

QUESTION, STEPS = "7*8-2*(3+4)=\n", ("7*8=56: 56-2*(3+4)\n", "3+4=7: 56-2*7\n")


@pytest.mark.parametrize("layer", [None, 2])
def test_the_server_scores_steps_as_the_head_was_trained(
    load_engine: Callable[..., Any], tmp_path: Path, layer: int | None
) -> None:
    """A head of an inner layer is in a checkpoint that ends there."""
    steps = tuple(tuple(TOKENIZER.encode(step, add_special_tokens=False)) for step in STEPS)
    rollout = Rollout("1", QUESTION, tuple(TOKENIZER.encode(QUESTION)), steps, ("", ""), is_right=True)
    policy = LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval()
    states = read(policy, rollout, layers=[2]).states[name_of(CHECKPOINT, layer)]
    weight = np.random.default_rng(0).normal(size=states.shape[1]) / np.abs(states).mean() / 2
    head = LinearHead(weight, float(-states[0] @ weight), layer)
    save(str(MODELS / "policy"), head, torch.float32, tmp_path)
    engine = load_engine(400, tmp_path)
    path, scores = engine.open_prompt(rollout.prompt_ids, QUESTION), []
    for depth, (text, token_ids) in enumerate(zip(STEPS, steps, strict=True), 1):
        ((score, path),) = engine.score([ScoreJob(path, None, token_ids, text, depth)])
        scores.append(score.score)
    expected = head.scores(states)
    assert scores == pytest.approx(list(expected), abs=1e-4)
    assert expected[0] == pytest.approx(0.5) and abs(expected[1] - 0.5) > 0.01
