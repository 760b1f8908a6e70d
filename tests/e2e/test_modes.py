"""Searches in other modes: large pages, chunked and mixed prefill, retraction, overlap, the Python tree core; and a key."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from sglang_ets.api.trace_pages import add_routes
from sglang_ets.core.registry import BUILT_IN
from tests.e2e.serving import KEY, PROBLEMS, Server, grown_tree, serving

pytestmark = pytest.mark.server

ALGORITHMS = tuple(BUILT_IN)
WIDTH = 8
PAGED = ("--page-size", "16", "--chunked-prefill-size", "64", "--enable-mixed-chunk")
TREE_CORES = re.compile(r"Tree Core: (\w+)")  # sglang's words for what it chose
PREFIX = "1+1=2\n" * 20  # with a problem behind it, longer than a chunk


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Every third forward pass sends running requests back to the queue."""
    log = tmp_path_factory.mktemp("paged") / "log.txt"
    with serving(log, ["--search", "ets", *PAGED], env={"SGLANG_TEST_RETRACT": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def overlapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The overlap schedule, pages of searches and a key."""
    flags = ["--search-trace", "--api-key", KEY]
    with serving(tmp_path_factory.mktemp("overlapped") / "log.txt", flags, overlaps=True) as running:
        yield replace(running, api_key=KEY)


def assert_every_policy_answers(server: Server) -> None:
    """All policies at once beside each other; no step fails, and both ledgers are empty afterwards."""
    with ThreadPoolExecutor(len(ALGORITHMS)) as clients:
        searches = {
            algorithm: clients.submit(
                server.search, PROBLEMS[0]["prompt"], WIDTH, max_tokens=128, seed=1, search={"algorithm": algorithm}
            )
            for algorithm in ALGORITHMS
        }
        answers = {algorithm: search.result() for algorithm, search in searches.items()}
    for algorithm, answer in answers.items():
        figures = answer["search"]
        assert (figures["algorithm"], figures["nodes_failed"]) == (algorithm, 0)
        assert figures["levels"] >= 2
        assert answer["choices"][0]["text"]
    state = server.wait_until_no_search()
    assert (state["live"], state["held_kv_tokens"], state["locks"]) == (0, 0, 0)
    assert (state["prm"]["held_kv_tokens"], state["prm"]["locks"]) == (0, 0)


def greedy(server: Server, prompt: str) -> str:
    body = {"model": "default", "prompt": prompt, "max_tokens": 48, "temperature": 0}
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def log_of(server: Server) -> str:
    return server.log.read_text(encoding="utf-8", errors="replace")


def test_large_pages_with_chunked_and_mixed_prefill_and_retraction(paged: Server, server: Server) -> None:
    flags = paged.get("/server_info")
    assert (flags["page_size"], flags["chunked_prefill_size"], flags["enable_mixed_chunk"]) == (16, 64, True)
    assert_every_policy_answers(paged)
    for prompt in (PROBLEMS[0]["prompt"], PREFIX + PROBLEMS[1]["prompt"]):
        assert greedy(paged, prompt) == greedy(server, prompt)
    assert "Testing retraction" in log_of(paged)
    assert "out of balance" not in log_of(paged)


def test_the_overlap_schedule(overlapped: Server, server: Server) -> None:
    assert overlapped.get("/server_info")["disable_overlap_schedule"] is False
    assert_every_policy_answers(overlapped)
    assert greedy(overlapped, PROBLEMS[0]["prompt"]) == greedy(server, PROBLEMS[0]["prompt"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_seed_grows_the_same_tree_with_the_overlap_schedule_and_with_a_retracted_row_per_node(
    overlapped: Server, paged: Server, server: Server, algorithm: str
) -> None:
    """Shared decoding on both schedules, and on large pages, where each step is prefilled and some are retracted."""
    for seed, problem in enumerate(PROBLEMS[:3]):
        trees = [
            grown_tree(one, problem["prompt"], WIDTH, algorithm=algorithm, max_tokens=128, seed=seed)
            for one in (server, overlapped, paged)
        ]
        assert trees[0] == trees[1], (algorithm, seed)
        assert trees[0] == trees[2], (algorithm, seed)


def test_the_python_tree_core_grows_the_same_trees(server: Server, tmp_path: Path) -> None:
    """sglang takes it where its compiled core does not go with the torch that is there."""
    assert TREE_CORES.findall(log_of(server)) == ["RustUnifiedTreeCore"] * 2  # of the policy model and the PRM
    env = {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}
    with serving(tmp_path / "log.txt", ["--search", "ets"], env=env) as plain:
        assert_every_policy_answers(plain)
        for algorithm in ALGORITHMS:
            asked = {"algorithm": algorithm, "max_tokens": 96, "seed": 2}
            trees = [grown_tree(one, PROBLEMS[1]["prompt"], 4, **asked) for one in (plain, server)]
            assert trees[0] == trees[1], algorithm
        state = plain.wait_until_no_search()
    assert TREE_CORES.findall(log_of(plain)) == ["UnifiedTreeCore"] * 2
    assert (state["held_kv_tokens"], state["locks"], state["prm"]["held_kv_tokens"], state["prm"]["locks"]) == (0,) * 4


def status_of(url: str, key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_key_protects_every_route_that_we_add(overlapped: Server) -> None:
    app = FastAPI()
    stock = {route.path for route in app.routes}  # type: ignore[attr-defined]
    add_routes(app, {"trace": True})
    ours = {route.path for route in app.routes} - stock  # type: ignore[attr-defined]
    assert len(ours) == 3
    search_id = overlapped.search(PROBLEMS[0]["prompt"], 2, max_tokens=32)["id"]
    for path in ours | {"/server_info"}:
        url = overlapped.url + path.replace("{search_id:path}", search_id)
        assert [status_of(url, key) for key in (None, "another", KEY)] == [401, 401, 200], path
    stranger = replace(overlapped, api_key="another")
    body: dict[str, Any] = {"model": "default", "prompt": PROBLEMS[0]["prompt"], "max_tokens": 8, "search_width": 2}
    assert stranger.post("/v1/completions", body)[0] == 401
