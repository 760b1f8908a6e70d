"""Servers with other flags: KV pools far too small for the search, and search switched off."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import PROBLEMS, Server, serving

pytestmark = pytest.mark.server

SMALL_POOL_TOKENS = 700  # one trajectory fits; the locks of a search of width 32 do not


def greedy(server: Server, problem: dict[str, Any]) -> str:
    body = {"model": "default", "prompt": problem["prompt"], "max_tokens": 128, "temperature": 0}
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def test_a_pool_too_small_for_the_locks_does_not_hang(tmp_path: Path) -> None:
    with serving(tmp_path / "log.txt", ["--search", "rebase", "--max-total-tokens", str(SMALL_POOL_TOKENS)]) as server:
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda p: server.search(p["prompt"], 32), PROBLEMS[:2]))
        assert all(answer["choices"][0]["text"] for answer in answers)
        assert sum(answer["metadata"]["search"]["kv_pressure_releases"] for answer in answers) > 0
        state = server.wait_until_no_search()
        assert (state["held_kv_tokens"], state["locks"]) == (0, 0)
        too_long = "1+" * SMALL_POOL_TOKENS
        body = {"model": "default", "prompt": too_long, "max_tokens": 8, "search_width": 4}
        status, refused = server.post("/v1/completions", body)
        assert status == 400, refused
        assert server.search(PROBLEMS[0]["prompt"], 4)["choices"][0]["text"]


def test_a_search_that_the_prm_cannot_hold_fails_alone(tmp_path: Path) -> None:
    flags = ["--search", "ets", "--prm-max-total-tokens", str(SMALL_POOL_TOKENS), "--search-max-width", "64"]
    with serving(tmp_path / "log.txt", flags) as server:
        body = {"model": "default", "prompt": PROBLEMS[0]["prompt"], "max_tokens": 512, "search_width": 8, "seed": 1}
        status, failed = server.post("/v1/completions", {**body, "search": {"algorithm": "best_of_n"}})
        assert status == 500, failed
        assert "search failed: " in failed["message"]
        state = server.wait_until_no_search()
        assert (state["live"], state["held_kv_tokens"], state["locks"]) == (0, 0, 0)
        assert greedy(server, PROBLEMS[0])
        assert server.search(PROBLEMS[0]["prompt"], 2)["choices"][0]["text"]

        sampling = {"max_new_tokens": 64, "custom_params": {"ets": '{"width": 128}'}}
        status, refused = server.post("/generate", {"text": PROBLEMS[0]["prompt"], "sampling_params": sampling})
        assert status == 400, refused
        assert "search_width must be at most 64 on this server, got 128" in refused["error"]["message"]


def test_without_search_the_server_is_stock(server: Server, tmp_path: Path) -> None:
    patched = [greedy(server, problem) for problem in PROBLEMS[:8]]
    with serving(tmp_path / "log.txt", ["--search", "off"]) as stock:
        assert [greedy(stock, problem) for problem in PROBLEMS[:8]] == patched
        assert "search" not in stock.get("/server_info")["internal_states"][0]
