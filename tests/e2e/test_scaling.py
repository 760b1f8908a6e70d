"""More than one rank or server: ranks that agree, data-parallel replicas, a router before servers, a worker that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from bench.server import _free_port
from sglang_ets.launch_server import MODELS
from sglang_ets.tools.plan import model_size
from tests.e2e.serving import PROBLEMS, TWO_PROCESSES, Server, serving

pytestmark = pytest.mark.server

ALGORITHMS = ("ets", "ets_kv", "rebase", "dvts", "beam", "best_of_n")
PROMPT = PROBLEMS[0]["prompt"]
CHECKER = {"SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}
DIVERGED = (
    "Found rank divergence",
    "this rank runs searches in the states",
    "out of balance",
    " locks on ",
    "CRITICAL",
)
START_LIMIT_S = 120
KILLED: set[str] = set()  # addresses of servers


def search(server: Server, algorithm: str, **fields: Any) -> dict[str, Any]:
    settings = {"algorithm": algorithm, **fields.pop("search", {})}
    return server.search(PROMPT, 8, seed=1, max_tokens=160, search=settings, **fields)


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def ends_of_searches(log: str, rank: str) -> list[str]:
    """What one rank logged of its finished searches, without their names and times."""
    lines = re.findall(rf" {rank}\] search \S+ (.*)", log)
    return [re.sub(r"in [\d.]+ s", "", line) for line in lines if " levels, " in line]


# ---- tensor-parallel ranks ----


def test_two_ranks_run_one_search(server: Server, tmp_path: Path) -> None:
    with serving(tmp_path / "log.txt", ["--tp", "2"], env={**TWO_PROCESSES, **CHECKER}) as ranks:
        with ThreadPoolExecutor(len(ALGORITHMS)) as clients:
            answers = list(clients.map(lambda name: search(ranks, name), ALGORITHMS))
        again = [text(search(ranks, name)) for name in ("ets", "rebase")]
        timed = ranks.search(PROMPT, 64, search={"algorithm": "rebase", "deadline_s": 2.5})
        halves = search(ranks, "rebase", search={"answer": "majority", "answer_pattern": r"(\d\d?)"})
        state = ranks.wait_until_no_search()
        log = ranks.log.read_text(encoding="utf-8", errors="replace")
    assert again == [text(answers[ALGORITHMS.index(name)]) for name in ("ets", "rebase")]
    assert timed["search"]["finish_reason"] == "deadline"
    assert halves["choices"][0]["search"]["votes"] >= 1
    assert (state["live"], state["locks"], state["prm"]["locks"], state["held_kv_tokens"]) == (0, 0, 0, 0)
    assert state["prm"]["ranks"] == 2
    assert "Rank consensus checker is enabled" in log
    assert [words for words in DIVERGED if words in log] == []
    first, second = ends_of_searches(log, "TP0"), ends_of_searches(log, "TP1")
    assert len(first) == len(ALGORITHMS) + 4
    assert first == second
    same = [
        name for name, answer in zip(ALGORITHMS, answers, strict=True) if text(search(server, name)) == text(answer)
    ]
    assert len(same) >= len(ALGORITHMS) // 2, f"as on one rank: {same}; sums of two ranks may differ in the last bit"


def test_plan_counts_what_a_server_allocates(server: Server) -> None:
    log = server.log.read_text(encoding="utf-8", errors="replace")
    pools = re.findall(r"KV Cache is allocated.*#tokens: (\d+), K size: ([\d.]+) GB, V size: ([\d.]+) GB", log)
    sizes = [model_size(str(MODELS / name), "float32") for name in ("prm", "policy")]  # the PRM's comes first
    assert len(pools) == len(sizes)
    for (tokens, keys, values), size in zip(pools, sizes, strict=True):
        planned_gib = int(tokens) * size.kv_bytes_per_token / 2**30
        assert float(keys) + float(values) == pytest.approx(planned_gib, abs=0.02)  # two numbers of two decimals


# ---- replicas, and a router before servers ----


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two data-parallel replicas in one server, which a test below kills."""
    log = tmp_path_factory.mktemp("replicas") / "log.txt"
    with ExitStack() as stack:
        running = stack.enter_context(serving(log, ["--dp-size", "2"], env=TWO_PROCESSES))
        yield running
        if running.url in KILLED:
            with pytest.raises(RuntimeError, match="ended by itself"):
                stack.close()


@contextmanager
def routing(log: Path, *workers: Server) -> Iterator[Server]:
    """sglang-router before these servers; it deals requests out in turn."""
    port, metrics_port = _free_port(), _free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--prometheus-port", str(metrics_port)]
    command += ["--worker-urls", *(worker.url for worker in workers)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    router = Server(f"http://127.0.0.1:{port}", log)
    try:
        wait_for_workers(router, len(workers))
        yield router
    finally:
        process.terminate()
        process.wait(30)


def wait_for_workers(router: Server, count: int) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        try:
            if len(router.get("/workers")["workers"]) == count:
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise AssertionError(router.log.read_text(encoding="utf-8", errors="replace")[-2000:])


@pytest.fixture(scope="module")
def router(server: Server, replicas: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with routing(tmp_path_factory.mktemp("router") / "log.txt", server, replicas) as running:
        yield running


def num_done(server: Server) -> list[int]:
    return [int(state["search"]["done"]) for state in server.get("/server_info")["internal_states"]]


def test_replicas_share_searches_and_answer_as_one_server(server: Server, replicas: Server) -> None:
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda name: search(replicas, name), ALGORITHMS[:4]))
    assert [text(answer) for answer in answers] == [text(search(server, name)) for name in ALGORITHMS[:4]]
    assert len(num_done(replicas)) == 2
    assert min(num_done(replicas)) >= 1
    assert sum(num_done(replicas)) == 4


def test_a_router_passes_on_searches_of_completions(router: Server, server: Server) -> None:
    answers = [search(router, "rebase") for _ in range(2)]  # one for each worker
    assert [text(answer) for answer in answers] == [text(search(server, "rebase"))] * 2
    assert answers[0]["search"]["width"] == 8
    status, refused = router.post("/v1/completions", {"model": "default", "prompt": PROMPT, "search_width": 0})
    assert status == 400
    assert "search_width must be" in str(refused)


def test_a_router_drops_the_search_of_a_chat_and_keeps_its_metadata(router: Server) -> None:
    chat = {"model": "default", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 64, "seed": 1}
    status, dropped = router.post("/v1/chat/completions", {**chat, "search_width": 4})
    assert status == 200
    assert "search" not in dropped, "if the router keeps the field now, docs/scaling.md is out of date"
    metadata = {"search_width": "4", "search": '{"algorithm": "rebase"}'}
    status, answer = router.post("/v1/chat/completions", {**chat, "metadata": metadata})
    assert status == 200, answer
    assert (answer["search"]["width"], answer["search"]["algorithm"]) == (4, "rebase")


def test_a_stream_whose_worker_dies_has_no_end(replicas: Server, tmp_path: Path) -> None:
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 512, "seed": 1, "stream": True, "search_width": 64}
    with routing(tmp_path / "log.txt", replicas) as alone:
        events = read_events(alone, {**body, "search_width": 4, "max_tokens": 32}, after_first=lambda: None)
        assert events[-1] == "[DONE]"
        assert any(reason_of(event) for event in events[:-1])
        events = read_events(alone, body, after_first=lambda: kill(replicas))
    assert events
    assert events[-1] != "[DONE]"
    assert not any(reason_of(event) for event in events)


def kill(server: Server) -> None:
    """End a server and all of its processes at once, as a machine that fails."""
    KILLED.add(server.url)
    os.killpg(os.getpgid(server_pid(server)), signal.SIGKILL)


def server_pid(server: Server) -> int:
    """Of the process that was started; it leads its group."""
    port = server.url.rsplit(":", 1)[1]
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words = (place / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"--port" in words and words[words.index(b"--port") + 1] == port.encode():
                return int(place.name)
    raise AssertionError(f"no process serves on port {port}")


def read_events(server: Server, body: dict[str, Any], after_first: Any) -> list[str]:
    """Data of a stream's events until it ends or breaks; the function is called at the first one."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    events: list[str] = []
    with urllib.request.urlopen(request, timeout=300) as response:
        try:
            for line in response:
                if line.startswith(b"data: "):
                    events.append(line[6:].decode().strip())
                    if len(events) == 1:
                        after_first()
        except (IncompleteRead, ConnectionError):
            pass  # the way the client learns of it
    return events


def reason_of(event: str) -> str | None:
    return next((choice["finish_reason"] for choice in json.loads(event)["choices"]), None)
