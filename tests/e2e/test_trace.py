"""Live pages of real searches: while they run and after, with and without a stream, and what `/server_info` says."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api.test_view import embedded
from tests.e2e.serving import OVERLAPS, PROBLEMS, Server

pytestmark = pytest.mark.server

WIDTH = 16
LIMIT_S = 60.0


def status_of(server: Server, path: str) -> tuple[int, str]:
    try:
        return 200, server.text(path)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["message"]


def watch(server: Server, rid: str) -> list[dict[str, Any]]:
    """Every event of a search, from as soon as the server knows it to its end."""
    end = time.monotonic() + LIMIT_S
    while status_of(server, f"/search/{rid}")[0] != 200 and time.monotonic() < end:
        time.sleep(0.02)
    lines = server.text(f"/search/{rid}/events").splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_running_search_is_followed_level_by_level_to_its_answer(traced: Server, stream: bool) -> None:
    rid = f"watched-{stream}"
    body = {"model": "default", "prompt": PROBLEMS[0]["prompt"], "max_tokens": 512, "rid": rid, "stream": stream}
    body |= {"search_width": WIDTH, "search": {"return_tree": True, "rebase_temperature": 0.5}}
    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch, traced, rid)
        url = f"{traced.url}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), traced.headers)
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            text = response.read().decode()
        told = watcher.result(LIMIT_S)
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] if stream else []
    search = (chunks[-1] if stream else json.loads(text))["search"]
    assert "trace" not in text
    assert search["rebase_temperature"] == 0.5
    assert [view["is_live"] for view in told] == [True] * (len(told) - 1) + [False]
    levels = [len(view["levels"]) for view in told]
    assert levels == sorted(levels)
    assert len(set(levels)) > 2 and levels[-1] == search["levels"]
    page = embedded(traced.text(f"/search/{rid}"))
    assert page == told[-1]
    assert [node["id"] for node in page["nodes"]] == [node["id"] for node in search["tree"]["nodes"]]
    assert [node["state"] for node in page["nodes"]] == [node["state"] for node in search["tree"]["nodes"]]
    for level in page["levels"]:  # with the overlap schedule the last token of a step may have its KV, too
        assert 0 <= level["measured_held_tokens"] - level["held_tokens"] <= level["leaves"] * OVERLAPS
    assert page["rebase_temperature"] == 0.5


def test_the_list_knows_what_ran_and_best_of_n_has_its_page(traced: Server) -> None:
    answer = traced.search(PROBLEMS[1]["prompt"], 4, search={"algorithm": "best_of_n"})
    row = traced.get("/search")["searches"][0]
    ended = answer["search"]["finish_reason"]  # complete, or settled before that
    assert (row["id"], row["state"], row["algorithm"]) == (answer["id"], ended, "best_of_n")
    assert len(embedded(traced.text(row["page"]))["answers"]) == 1


def test_a_body_has_the_shape_of_an_untraced_one(traced: Server, strict: Server) -> None:
    shapes = []
    for one in (traced, strict):
        answer = one.search(PROBLEMS[0]["prompt"], 4, n=2)
        shapes.append((set(answer), set(answer["choices"][0]), set(answer["usage"]), set(answer["search"])))
    assert shapes[0] == shapes[1]


def test_unknown_searches_and_a_server_without_the_flag_answer_in_one_sentence(traced: Server, strict: Server) -> None:
    for path in ("/search/none", "/search/none/events"):
        status, message = status_of(traced, path)
        assert status == 404 and "'none'" in message
    for path in ("/search", "/search/none", "/search/none/events"):
        status, message = status_of(strict, path)
        assert status == 404 and "--search-trace" in message


def test_a_refused_search_has_no_page(traced: Server) -> None:
    before = len(traced.get("/search")["searches"])
    body = {"model": "default", "prompt": "1+" * 40_000, "max_tokens": 8, "search_width": 4}
    assert traced.post("/v1/completions", body)[0] == 400
    assert len(traced.get("/search")["searches"]) == before


def test_server_info_tells_what_the_server_is_and_what_runs(traced: Server) -> None:
    done = threading.Event()

    def run() -> None:
        traced.search(PROBLEMS[2]["prompt"], 64, rid="shown")
        done.set()

    runner = threading.Thread(target=run)
    runner.start()
    seen: list[dict[str, Any]] = []
    while not seen and not done.is_set():
        seen = traced.search_state()["searches"]
        time.sleep(0.05)
    runner.join(LIMIT_S)
    assert [(live["id"], live["algorithm"], live["width"]) for live in seen] == [("shown", "ets", 64)]
    state = traced.wait_until_no_search()
    assert state["searches"] == [] and state["version"]
    assert state["prm"]["format"] == "likelihood"
    assert state["defaults"]["algorithm"] == "ets" and state["defaults"]["step_delimiter"] == ["\n"]
    assert "before managers.scheduler.Scheduler.__init__" in state["patches"]
    assert (state["held_kv_tokens"], state["locks"]) == (0, 0)
