"""Searches on a real server with the embedded models, as a client sees them."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.serving import PROBLEMS, Server

pytestmark = pytest.mark.server

ALGORITHMS = ["best_of_n", "beam", "dvts", "rebase", "ets_kv", "ets", "subpool"]
NUM_COMPARED = 8
WIDE = 64


def figures(answer: dict[str, Any]) -> dict[str, Any]:
    return dict(answer["search"])


def assert_nothing_held(server: Server) -> None:
    state = server.wait_until_no_search()
    assert (state["live"], state["held_kv_tokens"], state["locks"]) == (0, 0, 0), state


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_policy_answers_with_scores_and_figures(server: Server, algorithm: str) -> None:
    answer = server.search(PROBLEMS[0]["prompt"], n=2, search={"algorithm": algorithm})
    seen = figures(answer)
    assert seen["algorithm"] == algorithm
    assert seen["warnings"] == []
    assert seen["levels"] >= 2
    assert 0 < seen["kv_tokens_mean"] <= seen["kv_tokens_peak"] <= seen["kv_referenced_peak"]
    assert answer["usage"]["completion_tokens"] > seen["levels"]
    assert seen["prm_tokens"] > 0
    assert (seen["nodes_revived"] > 0) == (algorithm == "subpool")
    assert 1 <= len(answer["choices"]) <= 2
    for choice in answer["choices"]:
        result = choice["search"]
        assert choice["text"].count("\n") + 1 >= len(result["step_scores"]) > 0
        assert all(0 <= score <= 1 for score in result["step_scores"])
    assert_nothing_held(server)


def test_search_solves_problems(server: Server) -> None:
    def is_right(problem: dict[str, Any]) -> bool:
        text = server.search(problem["prompt"])["choices"][0]["text"]
        return f"The answer is {problem['answer']}" in text.splitlines()[-1]

    with ThreadPoolExecutor(4) as pool:
        right = sum(pool.map(is_right, PROBLEMS[:NUM_COMPARED]))
    assert right >= NUM_COMPARED // 2


def test_ets_holds_less_kv_than_rebase(server: Server) -> None:
    def mean_kv(algorithm: str) -> float:
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(
                lambda p: server.search(p["prompt"], search={"algorithm": algorithm, "kv_cost_weight": 2.0}),
                PROBLEMS[:NUM_COMPARED],
            )
            return sum(figures(answer)["kv_tokens_mean"] for answer in answers)

    assert mean_kv("ets") < mean_kv("rebase") < mean_kv("best_of_n")


def test_four_wide_searches_beside_ordinary_traffic(server: Server) -> None:
    def plain(problem: dict[str, Any]) -> str:
        body = {"model": "default", "prompt": problem["prompt"], "max_tokens": 64, "temperature": 0}
        status, answer = server.post("/v1/completions", body)
        assert status == 200
        assert "search" not in answer
        return str(answer["choices"][0]["text"])

    alone = [plain(problem) for problem in PROBLEMS[:6]]
    with ThreadPoolExecutor(10) as pool:
        searches = [pool.submit(server.search, problem["prompt"], WIDE) for problem in PROBLEMS[:4]]
        beside = list(pool.map(plain, PROBLEMS[:6]))
        answers = [search.result() for search in searches]
    assert beside == alone
    assert all(figures(answer)["width"] == WIDE and answer["choices"][0]["text"] for answer in answers)
    assert_nothing_held(server)


def test_chat_completions_search_too(server: Server) -> None:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": PROBLEMS[0]["prompt"]}],
        "max_tokens": 200,
        "search_width": 4,
    }
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"]
    assert figures(answer)["width"] == 4


def test_openai_client_streams_a_search(server: Server) -> None:
    chunks = list(
        server.client.completions.create(
            model="default", prompt=PROBLEMS[0]["prompt"], max_tokens=512, stream=True, extra_body={"search_width": 8}
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert "The answer is" in text
    assert chunks[-1].choices[0].finish_reason or chunks[-2].choices[0].finish_reason


def test_search_is_documented_in_openapi(server: Server) -> None:
    schemas = server.get("/openapi.json")["components"]["schemas"]
    assert "search_width" in schemas["CompletionRequest"]["properties"]
    assert "search" in schemas["CompletionRequest"]["properties"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"search_width": 0}, "search_width"),
        ({"search_width": 100_000}, "search_width"),
        ({"search": {"algorithm": "mcts"}}, "algorithm"),
        ({"search": {"kv_weight": 1.0}}, "kv_weight"),
        ({"search": {"kv_cost_weight": -1.0}}, "kv_cost_weight"),
        ({"search": {"answer_pattern": "("}}, "answer_pattern"),
        ({"n": 17}, "n"),
        ({"echo": True}, "echo"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 1_000_000}, "max_tokens"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(server: Server, fields: dict[str, Any], named: str) -> None:
    body = {"model": "default", "prompt": PROBLEMS[0]["prompt"], "max_tokens": 64, "search_width": 16, **fields}
    status, answer = server.post("/v1/completions", body)
    assert status == 400, answer
    message = answer["error"]["message"] if "error" in answer else answer["message"]
    assert named in message
    assert "\n" not in message
    assert "Traceback" not in message


def test_a_client_that_hangs_up_leaves_nothing_behind(server: Server) -> None:
    done = server.search_state()["done"]
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "default", "prompt": PROBLEMS[1]["prompt"], "max_tokens": 512, "search_width": 256}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        end = time.monotonic() + 20
        while not server.search_state()["live"] and time.monotonic() < end:
            time.sleep(0.05)
        assert server.search_state()["live"] == 1
    assert_nothing_held(server)
    assert server.search_state()["done"] == done
    assert server.search(PROBLEMS[1]["prompt"], 4)["choices"][0]["text"]


def test_deadline_returns_the_best_so_far(server: Server) -> None:
    answer = server.search(PROBLEMS[2]["prompt"], 64, search={"deadline_s": 2.5, "algorithm": "rebase"})
    seen = figures(answer)
    assert seen["finish_reason"] == "deadline"
    assert any(warning.startswith("deadline_s of 2.5 ended the search") for warning in seen["warnings"])
    assert seen["seconds"] < 5
    assert answer["choices"][0]["text"]
    assert_nothing_held(server)


def test_a_search_that_ends_leaves_requests_whose_ids_begin_with_its_own_alone(server: Server) -> None:
    def generate(rid: str, **sampling: Any) -> dict[str, Any]:
        body = {"rid": rid, "text": PROBLEMS[2]["prompt"], "sampling_params": sampling}
        status, answer = server.post("/generate", body)
        assert status == 200, answer
        return dict(answer)

    with ThreadPoolExecutor(3) as pool:
        strangers = [pool.submit(generate, rid, max_new_tokens=600, ignore_eos=True) for rid in ("pa/b", "pa/1")]
        custom = {"ets": {"search_width": 32, "deadline_s": 2.0, "algorithm": "rebase"}}
        search = generate("pa", max_new_tokens=512, custom_params=custom)
        assert search["meta_info"]["search"][0]["search"]["finish_reason"] == "deadline"  # steps were being made
        ends = [stranger.result()["meta_info"]["finish_reason"] for stranger in strangers]
    assert ends == [{"type": "length", "length": 600}] * 2
    assert_nothing_held(server)


def test_tree_is_returned_on_request(server: Server) -> None:
    answer = server.search(PROBLEMS[3]["prompt"], 8, search={"return_tree": True})
    tree = figures(answer)["tree"]
    nodes = tree["nodes"]
    assert len(nodes) == figures(answer)["nodes_made"]
    known = {0, *(node["id"] for node in nodes)}
    assert all(node["parent"] in known for node in nodes)


def test_cache_flush_waits_for_searches(server: Server) -> None:
    thread = threading.Thread(target=server.search, args=(PROBLEMS[4]["prompt"], 32))
    thread.start()
    while not server.search_state()["live"] and thread.is_alive():
        time.sleep(0.02)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/flush_cache", b""), timeout=60)
    thread.join()
    assert_nothing_held(server)
