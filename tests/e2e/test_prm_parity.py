"""Every step score that the server gives equals transformers on the whole trajectory in one forward pass, float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import sglang_ets
from tests.e2e.serving import PROBLEMS, Server

pytestmark = pytest.mark.server

MODELS = Path(sglang_ets.__file__).parent / "models"
TOLERANCE = 1e-4
TOKENIZER = AutoTokenizer.from_pretrained(MODELS / "policy")


def scored_paths(answer: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """For each scored node of the returned tree the nodes from the first step to it."""
    nodes = answer["search"]["tree"]["nodes"]
    by_id = {node["id"]: node for node in nodes}
    paths = []
    for node in nodes:
        path = [node]
        while path[0]["parent"] in by_id:
            path.insert(0, by_id[path[0]["parent"]])
        if node["score"] is not None:
            paths.append(path)
    return paths


def search_tree(
    server: Server, algorithm: str = "rebase", **fields: Any
) -> tuple[list[int], list[list[dict[str, Any]]]]:
    prompt = PROBLEMS[5]["prompt"]
    answer = server.search(prompt, 8, search={"algorithm": algorithm, "return_tree": True}, **fields)
    return TOKENIZER.encode(prompt), scored_paths(answer)


def step_ids(path: list[dict[str, Any]]) -> list[int]:
    return [token for node in path for token in node["token_ids"]]


@torch.no_grad()
def assert_confident(server: Server) -> None:
    """On a server whose PRM format is `confidence`."""
    model = LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval()
    prompt, paths = search_tree(server, "ets")
    state = server.search_state()["prm"]
    assert state["format"] == "confidence"
    assert state["shares_policy_weights"]
    for path in paths:
        ids, length = prompt + step_ids(path), len(path[-1]["token_ids"])
        taken = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        assert path[-1]["score"] == pytest.approx(float(taken[-length:].mean().exp()), abs=TOLERANCE)
    assert len({round(path[-1]["score"], 3) for path in paths}) > 5


@torch.no_grad()
def test_likelihood(server: Server) -> None:
    model = LlamaForCausalLM.from_pretrained(MODELS / "prm", dtype=torch.float32).eval()
    prompt, paths = search_tree(server)
    seen = set()
    for path in paths:
        expected = 1.0  # the smallest of the steps' scores
        logprobs = model(torch.tensor([prompt + step_ids(path)])).logits[0].log_softmax(-1)
        start = len(prompt)
        for node in path:
            ids = node["token_ids"]
            marks = [place for place, token in enumerate(ids) if "=" in TOKENIZER.decode([token])]
            first = marks[0] + 1 if marks and marks[0] + 1 < len(ids) else 0
            own = sum(float(logprobs[start + place - 1, ids[place]]) for place in range(first, len(ids)))
            expected = min(expected, math.exp(own))
            start += len(ids)
        assert path[-1]["score"] == pytest.approx(expected, abs=TOLERANCE / 2)
        seen.add(round(expected, 4))
    assert len(seen) > 3
