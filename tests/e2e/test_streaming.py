"""Streams of real searches through the openai client: early text, progress, and the same answer as without a stream."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from tests.e2e.serving import PROBLEMS, Server

pytestmark = pytest.mark.server

WIDTH = 8


def fields(problem: int, **more: Any) -> dict[str, Any]:
    return {"model": "default", "prompt": PROBLEMS[problem]["prompt"], "max_tokens": 512, "seed": 3, **more}


def chunks_of(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Every chunk as it stands on the wire."""
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        lines = [line.decode().strip() for line in response if line.strip()]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def path_texts(tree: dict[str, Any]) -> dict[int, str]:
    """Text from the prompt's end to the end of each node."""
    texts = {0: ""}
    for node in tree["nodes"]:
        texts[node["id"]] = texts[node["parent"]] + node["text"]
    return texts


@pytest.mark.parametrize("algorithm", ["ets", "rebase", "beam", "best_of_n"])
def test_a_stream_joins_to_the_best_trajectory_of_its_tree(server: Server, algorithm: str) -> None:
    for problem in range(2):
        search = {"algorithm": algorithm, "answer": "best", "return_tree": True}  # a majority may prefer another one
        body = fields(problem, search_width=WIDTH, search=search, stream_options={"include_usage": True})
        chunks = chunks_of(server, "/v1/completions", body)
        assert chunks[-1]["usage"]["completion_tokens"] > WIDTH
        end = chunks[-2]
        tree = end["search"]["tree"]
        texts = path_texts(tree)
        complete = [node for node in tree["nodes"] if node["state"] == "complete"]
        best = max(complete, key=lambda node: (node["score"], -node["id"]))
        assert joined(chunks) == texts[best["id"]]
        assert end["choices"][0]["search"]["score"] == best["score"]
        told = [chunk["search"]["progress"] for chunk in chunks[:-3] if "search" in chunk]
        levels = [progress["level"] for progress in told]
        assert levels == sorted(set(levels))
        assert bool(told) == (algorithm != "best_of_n")
        assert all(0 < p["retained"] <= WIDTH and p["kv_held_tokens"] > 0 for p in told)


@pytest.mark.parametrize("algorithm", ["ets", "rebase", "best_of_n"])
def test_a_stream_joins_to_the_answer_of_the_same_seed(server: Server, algorithm: str) -> None:
    for problem in range(2):
        same = {"search": {"algorithm": algorithm}}
        whole = server.search(PROBLEMS[problem]["prompt"], WIDTH, seed=3, **same)
        assert (
            joined(chunks_of(server, "/v1/completions", fields(problem, search_width=WIDTH, **same)))
            == (whole["choices"][0]["text"])
        )


def test_text_that_is_final_comes_before_the_answer(server: Server) -> None:
    body = fields(0, search_width=WIDTH, search={"algorithm": "ets", "kv_cost_weight": 8.0, "diversity_weight": 0.0})
    chunks = chunks_of(server, "/v1/completions", body)
    early = "".join(chunk["choices"][0]["text"] for chunk in chunks if "progress" in chunk.get("search", {}))
    assert early
    assert joined(chunks).startswith(early)


def test_a_refusal_is_a_status_and_not_a_stream(server: Server) -> None:
    status, answer = server.post("/v1/completions", fields(0, search_width=WIDTH, stream=True, echo=True))
    assert (status, answer["type"]) == (400, "BadRequest")
