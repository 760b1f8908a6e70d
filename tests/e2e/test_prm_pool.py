"""Small PRMs on a real server: no step fails for want of KV, what cannot fit is refused, nothing is left locked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForTokenClassification

from tests.e2e.serving import PROBLEMS, Server, serving
from tests.e2e.test_prm_parity import MODELS, TOKENIZER, TOLERANCE, search_tree, step_ids

pytestmark = pytest.mark.server

PROMPTS = [problem["prompt"] for problem in PROBLEMS[:4]]
CONTEXT_TOKENS, POOL_TOKENS = 160, 2000
FITTING_TOKENS = 100  # of an answer to one of the problems
OUT_OF_BALANCE = ("out of balance", " locks on ", "the PRM failed")


def search(server: Server, prompt: str, width: int, algorithm: str, **fields: Any) -> tuple[int, Any]:
    body = {"model": "default", "prompt": prompt, "max_tokens": 256, "seed": 1, "search_width": width, **fields}
    return server.post("/v1/completions", {**body, "search": {"algorithm": algorithm}})


def failed_steps(answer: Any) -> int:
    return int(answer["search"]["nodes_failed"])


def assert_sound(server: Server) -> dict[str, Any]:
    """Nothing is held, and no account was out of balance when the last search ended; returns the PRM's figures."""
    state = server.wait_until_no_search()
    assert state["live"] == 0
    assert (state["locks"], state["prm"]["locks"], state["prm"]["held_kv_tokens"]) == (0, 0, 0)
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert not [words for words in OUT_OF_BALANCE if words in log]
    return dict(state["prm"])


@dataclass(frozen=True)
class Small:
    """A server, and its PRM in transformers."""

    server: Server
    prm: LlamaForTokenClassification


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """A checkpoint that transformers saved, with a short context and a pool that four searches fill."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LlamaConfig.from_pretrained(MODELS / "policy").vocab_size,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        num_labels=2,
        initializer_range=0.2,  # large enough that scores differ
    )
    prm = LlamaForTokenClassification(config).eval()
    prm.save_pretrained(folder / "prm")
    TOKENIZER.save_pretrained(folder / "prm")
    flags = ["--prm-model-path", str(folder / "prm"), "--prm-max-total-tokens", str(POOL_TOKENS)]
    with serving(folder / "log.txt", flags) as running:
        yield Small(running, prm)


@torch.no_grad()
def test_scores_of_a_token_classification_are_transformers_own(small: Small) -> None:
    prompt, paths = search_tree(small.server, max_tokens=FITTING_TOKENS)
    assert small.server.search_state()["prm"]["format"] == "token_classification"
    expected = []
    for path in paths:
        logits = small.prm(torch.tensor([prompt + step_ids(path)])).logits[0, -1]
        expected.append(float(logits.softmax(-1)[1]))
        assert path[-1]["score"] == pytest.approx(expected[-1], abs=TOLERANCE)
    assert max(expected) - min(expected) > 100 * TOLERANCE


def test_four_searches_at_once_share_a_pool_of_2000_tokens(small: Small) -> None:
    algorithms = ("ets", "rebase", "dvts", "beam")
    with ThreadPoolExecutor(4) as clients:
        answers = list(
            clients.map(
                lambda at: search(small.server, PROMPTS[at], 64, algorithms[at], max_tokens=FITTING_TOKENS), range(4)
            )
        )
    assert [status for status, _ in answers] == [200] * 4, answers
    assert [failed_steps(answer) for _, answer in answers] == [0] * 4
    state = assert_sound(small.server)
    assert state["pool_tokens"] == POOL_TOKENS
    assert state["locks_given_up"] > 0
    assert "gives up paths" in small.server.log.read_text(encoding="utf-8", errors="replace")


def test_a_pool_of_one_trajectory_serves_every_width(strict: Server) -> None:
    for algorithm, width in (("ets", 16), ("rebase", 32), ("best_of_n", 16)):
        status, answer = search(strict, PROMPTS[0], width, algorithm, max_tokens=512)
        assert status == 200, answer
        assert failed_steps(answer) == 0
    assert assert_sound(strict)["locks_given_up"] > 0
    status, answer = search(strict, PROMPTS[0], 4, "ets", max_tokens=600)
    assert status == 400
    assert "for the PRM, whose KV pool takes 599; lower max_tokens or raise --prm-max-total-tokens" in str(answer)


def test_a_context_that_is_too_short_is_refused_at_admission(small: Small) -> None:
    status, answer = search(small.server, PROMPTS[0], 8, "ets")
    assert status == 400
    assert "whose context is 160; lower max_tokens or shorten the prompt" in str(answer)
    for algorithm in ("ets", "best_of_n"):
        status, answer = search(small.server, PROMPTS[0], 8, algorithm, max_tokens=FITTING_TOKENS)
        assert status == 200, answer
        assert failed_steps(answer) == 0
    assert assert_sound(small.server)["context_tokens"] == CONTEXT_TOKENS
