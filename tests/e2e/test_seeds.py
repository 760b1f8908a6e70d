"""The same seed grows the same tree at temperature 1, alone and beside other traffic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event
from typing import Any

import pytest

from tests.e2e.serving import PROBLEMS, Server, grown_tree

pytestmark = pytest.mark.server

PROMPT = PROBLEMS[0]["prompt"]


def tree(server: Server, algorithm: str = "ets", **fields: Any) -> list[tuple[Any, ...]]:
    """Every node with its text and what became of it."""
    return grown_tree(server, PROMPT, 8, algorithm=algorithm, **fields)


@pytest.mark.parametrize("algorithm", ["ets", "best_of_n"])
def test_the_same_seed_grows_the_same_tree_also_beside_other_traffic(server: Server, algorithm: str) -> None:
    alone = tree(server, algorithm, seed=5)
    assert len(alone) > 8
    assert tree(server, algorithm, seed=5) == alone
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.search, PROBLEMS[i]["prompt"], 8, seed=i) for i in range(1, 3)]
        plain = {"model": "default", "prompt": PROMPT, "max_tokens": 200, "temperature": 1, "n": 6}
        others.append(pool.submit(server.client.completions.create, **plain))
        assert tree(server, algorithm, seed=5) == alone
        for other in others:
            other.result()
    assert tree(server, algorithm, seed=6) != alone


def test_a_request_without_a_seed_gets_a_fresh_one_and_tells_it(server: Server) -> None:
    first, second = (server.search(PROMPT, 4)["search"]["seed"] for _ in range(2))
    assert first != second


def test_ordinary_samples_of_one_seed_differ_as_on_stock_sglang(server: Server) -> None:
    done = server.client.completions.create(
        model="default", prompt=PROMPT, max_tokens=60, temperature=1, n=8, seed=1, stop=["\n"]
    )
    assert len({choice.text for choice in done.choices}) > 1


@pytest.mark.parametrize("cut", [{}, {"min_p": 0.05}, {"min_p": 0.05, "top_p": 0.9, "top_k": 8}])
def test_a_tree_is_its_own_whatever_cuts_the_tokens_of_other_requests(server: Server, cut: dict[str, Any]) -> None:
    alone = tree(server, seed=5, temperature=1, **cut)
    is_over = Event()

    def others(fields: dict[str, Any]) -> int:
        """Ordinary requests, one after another, while the search runs."""
        plain = {"model": "default", "prompt": PROMPT, "max_tokens": 100, "temperature": 1, **fields}
        for sent in count(1):
            status, answer = server.post("/v1/completions", plain)
            assert status == 200, answer
            if is_over.is_set():
                return sent
        raise AssertionError("never reached")

    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(others, fields) for fields in ({"min_p": 0.1}, {"top_k": 4}, {"top_p": 0.5, "n": 2})]
        try:
            assert tree(server, seed=5, temperature=1, **cut) == alone
        finally:
            is_over.set()
        assert all(other.result() >= 1 for other in beside)


def test_min_p_that_leaves_one_token_is_greedy_for_an_ordinary_request_and_for_a_search(server: Server) -> None:
    plain = {"model": "default", "prompt": PROMPT, "max_tokens": 512}
    greedy, cut = (server.post("/v1/completions", {**plain, **f}) for f in ({"temperature": 0}, {"min_p": 1.0}))
    assert (greedy[0], cut[0]) == (200, 200), cut
    text = greedy[1]["choices"][0]["text"]
    assert cut[1]["choices"][0]["text"] == text
    assert server.search(PROMPT, 4, min_p=1.0)["choices"][0]["text"] == text
