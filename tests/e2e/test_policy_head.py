"""A head on the policy model's own states in a real server: scores and embeddings are those of transformers, float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from bench.testbed.rollouts import Rollout
from bench.testbed.verifiers import name_of, read
from sglang_ets.prm.choose import POLICY_HEAD
from sglang_ets.prm.policy_head import LinearHead
from tests.e2e.serving import PROBLEMS, Server, serving
from tests.e2e.test_modes import PAGED, assert_every_policy_answers
from tests.e2e.test_prm_parity import MODELS, TOKENIZER, scored_paths

pytestmark = pytest.mark.server
TOLERANCE = 1e-4
PROMPT = PROBLEMS[5]["prompt"]
INNER = 2
SEARCHES = {"algorithm": "ets"}, {"algorithm": "best_of_n"}, {"algorithm": "dora", "speculate": True}


def head(layer: int | None) -> LinearHead:
    """With scores that spread over most of 0..1."""
    weight = np.random.default_rng(0).normal(size=_model().config.hidden_size)
    scale = np.linalg.norm(weight) * (1 if layer is None else 60)  # states are larger where nothing has normalised them
    return LinearHead(weight / scale, 0.1, layer)


def _model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def layer(headed: Server) -> int | None:
    """That the head of the server reads."""
    return LinearHead.load(str(headed.log.parent)).layer


@pytest.fixture(scope="module", params=["last states", "inner layer, paged, retracted, overlapped"])
def headed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, is_rough = tmp_path_factory.mktemp("head"), request.param.startswith("inner")
    head(INNER if is_rough else None).save(folder)
    flags = ["--search", "ets", "--prm-model-path", str(folder), *(PAGED if is_rough else ())]
    env = {"SGLANG_TEST_RETRACT": "1"} if is_rough else None
    with serving(folder / "log.txt", flags, env=env, overlaps=is_rough) as running:
        yield running


def test_scores_and_embeddings_are_read_from_the_states_that_chose_the_tokens(
    headed: Server, layer: int | None
) -> None:
    model, known = _model(), head(layer)
    prompt_ids = tuple(TOKENIZER.encode(PROMPT))
    scores, worst = set(), 0.0
    for search in SEARCHES:
        wanted = {**search, "return_tree": True, "return_embeddings": True}
        for path in scored_paths(headed.search(PROMPT, 8, seed=3, search=wanted)):
            steps = tuple(tuple(node["token_ids"]) for node in path)
            seen = read(model, Rollout("1", PROMPT, prompt_ids, steps, (), is_right=True), [INNER])
            expected = known.scores(seen.states[name_of(POLICY_HEAD, layer)])[-1]
            ids = torch.tensor([[*prompt_ids, *(token for step in steps for token in step)]])
            with torch.no_grad():
                whole = model.model(ids, output_hidden_states=True)
            states = whole.last_hidden_state if layer is None else whole.hidden_states[layer]
            mean = states[0, -len(steps[-1]) - 1 : -1].numpy().mean(0)
            worst = max(worst, abs(path[-1]["score"] - expected))
            assert path[-1]["embedding"] == pytest.approx(list(mean / np.linalg.norm(mean)), abs=TOLERANCE)
            scores.add(round(expected, 3))
    assert worst < TOLERANCE and len(scores) > 10
    state = headed.wait_until_no_search()["prm"]
    assert (state["format"], state["tokens_extended"], state["pool_tokens"], state["locks"]) == (POLICY_HEAD, 0, 0, 0)


def test_every_policy_is_answered_and_ordinary_requests_beside_it(headed: Server) -> None:
    assert_every_policy_answers(headed)
    status, answer = headed.post("/generate", {"text": PROMPT, "sampling_params": {"max_new_tokens": 8}})
    assert status == 200 and "hidden_states" not in answer["meta_info"]
    status, answer = headed.post("/generate", {"text": PROMPT, "return_hidden_states": True})
    assert status == 400 and "exceeds the server maximum `last`" in answer["error"]["message"], (
        "as without searches, in other words"
    )
