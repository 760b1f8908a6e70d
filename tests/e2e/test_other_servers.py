"""Servers with other flags: KV pools far too small for the search, and bounds on searches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.serving import ONE_TRAJECTORY_TOKENS, PROBLEMS, Server, serving

pytestmark = pytest.mark.server

WAIT_LIMIT_S = 20.0  # of an ordinary request beside searches that fill the pool; it was 38 s before searches queued


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("crowded") / "log.txt"
    with serving(log, ["--search", "rebase", "--max-total-tokens", str(ONE_TRAJECTORY_TOKENS)]) as running:
        yield running


def greedy(server: Server, problem: dict[str, Any]) -> str:
    body = {"model": "default", "prompt": problem["prompt"], "max_tokens": 128, "temperature": 0}
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def assert_nothing_held(server: Server) -> None:
    state = server.wait_until_no_search()
    assert (state["live"], state["held_kv_tokens"], state["locks"], state["prm"]["locks"]) == (0, 0, 0, 0)


def wait_until(is_true: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_wide_searches_in_a_pool_too_small_for_their_locks_all_answer(crowded: Server) -> None:
    with ThreadPoolExecutor(4) as clients:
        searches = [clients.submit(crowded.search, problem["prompt"], 64, max_tokens=96) for problem in PROBLEMS[:4]]
        wait_until(lambda: crowded.search_state()["held_kv_tokens"] > ONE_TRAJECTORY_TOKENS // 2)
        waits_s = []
        for problem in PROBLEMS[4:6]:
            started = time.monotonic()
            assert greedy(crowded, problem)
            waits_s.append(time.monotonic() - started)
        assert not all(search.done() for search in searches), "ordinary requests were to meet searches"
        answers = [search.result() for search in searches]
    assert max(waits_s) < WAIT_LIMIT_S
    figures = [answer["search"] for answer in answers]
    assert all(answer["choices"][0]["text"] for answer in answers)
    assert [figure["nodes_failed"] for figure in figures] == [0] * 4
    assert sum(figure["kv_pressure_releases"] for figure in figures) > 0
    assert_nothing_held(crowded)


def test_what_can_never_fit_is_refused_and_the_server_goes_on(crowded: Server) -> None:
    body = {"model": "default", "prompt": "1+" * ONE_TRAJECTORY_TOKENS, "max_tokens": 8, "search_width": 4}
    status, refused = crowded.post("/v1/completions", body)
    assert status == 400, refused
    assert crowded.search(PROBLEMS[0]["prompt"], 2)["choices"][0]["text"]


def test_a_search_wider_than_the_prms_pool_answers(strict: Server) -> None:
    answer = strict.search(PROBLEMS[0]["prompt"], 8, seed=1, search={"algorithm": "best_of_n"})
    assert answer["search"]["nodes_failed"] == 0
    assert_nothing_held(strict)


def test_a_native_request_keeps_to_the_servers_largest_width(strict: Server) -> None:
    sampling = {"max_new_tokens": 64, "custom_params": {"ets": '{"width": 128}'}}
    status, refused = strict.post("/generate", {"text": PROBLEMS[0]["prompt"], "sampling_params": sampling})
    assert status == 400, refused
    assert "search_width must be at most 64 on this server, got 128" in refused["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_search_that_may_not_even_wait_is_refused_with_a_time_to_come_again(strict: Server, stream: bool) -> None:
    create = strict.client.completions.create  # before the search: openai's imports took seconds on a busy machine
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(strict.search, PROBLEMS[0]["prompt"], 64, seed=0, search={"early_stop": "off"})
        wait_until(lambda: strict.search_state()["running"] == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            create(
                model="default",
                prompt=PROBLEMS[1]["prompt"],
                max_tokens=64,
                stream=stream,
                extra_body={"search_width": 2},
            )
        assert first.result()["choices"][0]["text"]
    assert refused.value.status_code == 429
    assert int(refused.value.response.headers["Retry-After"]) > 0
    assert "--search-max-waiting" in refused.value.message
    assert strict.search(PROBLEMS[1]["prompt"], 2)["choices"][0]["text"]
    assert_nothing_held(strict)
