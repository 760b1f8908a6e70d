"""What goes wrong while a search runs, in each of its phases: the search says so, and everybody else is served as before.

`FAULTS` is the only list: the tests are made from it, and so is the table of docs/reliability.md.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from bench.server import ServerEnded
from tests.e2e.faulty import OUT_OF_MEMORY, OUT_OF_VOCABULARY, PHASES, Phase, Phases, held, make_plugin
from tests.e2e.serving import PROBLEMS, Server, serving
from tests.e2e.test_prm_parity import assert_confident

pytestmark = pytest.mark.server

PROMPT = PROBLEMS[0]["prompt"]
MODELS = Path(__file__).parents[2] / "sglang_ets" / "models"
TOLD_S = 0.4  # the server has been told what is done to it
ACTED_LIMIT_S = 10.0  # of what needs no answer of the scheduler, which may be held up
NOTICED_S = 1.3  # a client that is gone: the server looks for it once a second
STOP_LIMIT_S = 10.0
NO_INTEGERS = r"([^\n]+)"  # answers that only the voting process can compare
_numbers = itertools.count()


@dataclass(frozen=True)
class Outcome:
    """What becomes of the search."""

    words: str  # in the table
    status: int | None  # of the response; None: nobody is there to get it
    counted: str  # label `outcome` of the metric sglang_ets_searches


ANSWERED = Outcome("answered", 200, "complete")
WARNED = Outcome("answered with a warning", 200, "complete")
CUT_SHORT = Outcome("answered with a warning", 200, "deadline")
FAILED = Outcome("error 500", 500, "failed")
ABORTED = Outcome("error 499", 499, "aborted")
EXPIRED = Outcome("error 504", 504, "expired")
STOPPED = Outcome("error 503", 503, "aborted")
GONE = Outcome("ended", None, "aborted")


@dataclass(frozen=True)
class Run:
    """One search on its way into a fault."""

    server: Server
    phases: Phases
    rid: str
    connection: http.client.HTTPConnection


def nothing(_: Run | Server) -> None:
    """The plugin does it."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, and what becomes of the search in each phase where it can."""

    name: str
    what: str
    outcomes: Mapping[Phase, Outcome]
    sentence: str = ""  # in the error or the warning
    act: Callable[[Run], None] = nothing
    before: Callable[[Server], None] = nothing  # the search begins
    request: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)


def everywhere(outcome: Outcome) -> dict[Phase, Outcome]:
    return dict.fromkeys(PHASES, outcome)


# ---- what is done to the server from outside ----


def hang_up(run: Run) -> None:
    run.connection.sock.shutdown(socket.SHUT_RDWR)
    time.sleep(NOTICED_S)


def abort(run: Run) -> None:
    fetch(run.server, "/abort_request", {"rid": run.rid})
    time.sleep(TOLD_S)  # the answer comes before the scheduler is told


def flush(run: Run) -> None:
    status, text = fetch(run.server, "/flush_cache", {})
    assert (status, "not flushed" in text or "failed" in text.lower()) == (400, True), text


def pause(mode: str) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        assert fetch(run.server, "/pause_generation", {"mode": mode})[0] == 200
        time.sleep(0.1)
        assert fetch(run.server, "/continue_generation", {})[0] == 200

    return act


def release_memory(run: Run) -> None:
    status, text = fetch(run.server, "/release_memory_occupation", {})
    assert (status, "memory can be released only while nothing runs" in text) == (400, True), text


def update_weights(run: Run) -> None:
    status, text = fetch(run.server, "/update_weights_from_disk", {"model_path": str(MODELS / "policy")})
    assert (status, json.loads(text)["success"]) == (200, True), text


def kill_voter(run: Run) -> None:
    (process,) = voters(run.server)
    process.kill()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def start_voter(server: Server) -> None:
    """A search whose answers differ starts the process; with equal ones it would not be asked."""
    server.search(PROMPT, 8, seed=0, max_tokens=48, search={"max_steps": 1, "answer_pattern": NO_INTEGERS})
    assert len(voters(server)) == 1


def voters(server: Server) -> list[psutil.Process]:
    children = server_process(server).children(recursive=True)
    return [process for process in children if "sglang_ets.math_process" in process.cmdline()]


def server_process(server: Server) -> psutil.Process:
    port = str(urlsplit(server.url).port)
    return next(process for process in psutil.Process().children() if port in process.cmdline())


WEIGHTS = Fault("weights", "`/update_weights_from_disk`, which waits", everywhere(ANSWERED), act=update_weights)
FAULTS: tuple[Fault, ...] = (
    Fault("client gone", "the client closes its connection", everywhere(GONE), act=hang_up),
    Fault(
        "client of a stream gone",
        "the same, with `stream: true`",
        everywhere(GONE),
        act=hang_up,
        request={"stream": True},
    ),
    Fault("abort", "`/abort_request` with the id of the search", everywhere(ABORTED), "/abort_request named it", abort),
    Fault(
        "deadline",
        "`deadline_s` passes",
        {**everywhere(CUT_SHORT), "begin": EXPIRED, "rank": ANSWERED},
        "deadline",
        search={"deadline_s": 100},
    ),
    Fault("prm raises", "a call of the PRM raises", {"begin": FAILED, "score": FAILED}, "injected into the PRM"),
    Fault("prm nan", "the PRM's score of a step is no number", {"score": WARNED}, "no finite number"),
    Fault("prm nan of all", "its score of every step is no number", {"score": FAILED}, "more than half"),
    Fault("solver fails", "the solver ends without a solution, or out of time", {"select": WARNED}, "REBASE decided"),
    Fault("solver raises", "the solver raises", {"select": FAILED}, "injected into the solver"),
    Fault("logits", "the logits of a step are not finite", {"decode": WARNED}, "logits are not finite"),
    Fault("logits of all", "the logits of every step are not finite", {"decode": FAILED}, "more than half"),
    Fault("no memory", "sglang ends a step for want of memory", {"decode": WARNED}, OUT_OF_MEMORY),
    Fault("no memory of all", "it ends every step for want of memory", {"decode": FAILED}, "more than half"),
    Fault("flush", "`/flush_cache`, which is refused", everywhere(ANSWERED), act=flush),
    Fault(
        "pause",
        "`/pause_generation` in place, then `/continue_generation`",
        everywhere(ANSWERED),
        act=pause("in_place"),
    ),
    Fault("retract", "the same with mode `retract`", everywhere(ANSWERED), act=pause("retract")),
    Fault("release", "`/release_memory_occupation`, which is refused", everywhere(ANSWERED), act=release_memory),
    WEIGHTS,
    Fault(
        "voter killed",
        "the process that compares answers is killed before it is asked",
        {"select": ANSWERED, "rank": ANSWERED},
        act=kill_voter,
        before=start_voter,
        search={"answer_pattern": NO_INTEGERS},
    ),
    Fault(
        "voter dies",
        "that process dies while it compares",
        {"rank": WARNED},
        "answers were not compared",
        search={"answer_pattern": NO_INTEGERS},
    ),
)
SIGTERM = Fault("stop", "SIGTERM", everywhere(STOPPED), "the server is stopping")
LONG_STEPS = Fault(
    "stop", "", {}, search={"step_delimiter": "never", "max_step_tokens": 400}, request={"max_tokens": 400}
)
CASES = [(fault, phase) for fault in FAULTS for phase in fault.outcomes]


@dataclass(frozen=True)
class Faulty:
    """A server that takes faults."""

    server: Server
    phases: Phases


@pytest.fixture
def faulty(traced: Server) -> Faulty:
    return Faulty(traced, Phases(traced.log.parent))


def fetch(server: Server, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
    """Status and text of a response."""
    connection = connect(server)
    return send(connection, path, body)


def connect(server: Server) -> http.client.HTTPConnection:
    address = urlsplit(server.url)
    return http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)


def send(connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def begin(faulty: Faulty, fault: Fault, phase: Phase) -> Run:
    rid = f"{fault.name}@{phase}#{next(_numbers)}"
    return Run(faulty.server, faulty.phases, rid, connect(faulty.server))


def ask(run: Run, fault: Fault) -> tuple[int, str]:
    """The search; its fault is in the id."""
    search = {"algorithm": "ets", "max_steps": 2, **fault.search}
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 96, "search_width": 4, "seed": 1, "rid": run.rid}
    return send(run.connection, "/v1/completions", {**body, **fault.request, "search": search})


def searches_counted(server: Server, outcome: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    ours = [line for line in lines if line.startswith("sglang_ets_searches_total{") and f'outcome="{outcome}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in ours)


def assert_served_as_before(server: Server) -> None:
    state = server.wait_until_no_search()
    assert (state["live"], state["running"], state["waiting"], state["steps_in_engine"]) == (0, 0, 0, 0)
    held_now = (state["locks"], state["held_kv_tokens"], state["prm"]["locks"], state["prm"]["held_kv_tokens"])
    assert held_now == (0, 0, 0, 0)
    status, answer = server.post("/v1/completions", {"model": "default", "prompt": PROMPT, "max_tokens": 4})
    assert status == 200, answer
    answered = server.search(PROMPT, 2, max_tokens=48, search={"max_steps": 1})
    assert answered["search"]["warnings"] == []


def assert_says_so(fault: Fault, outcome: Outcome, answer: str) -> None:
    body = json.loads(answer)
    if outcome.status == 200:
        warnings = body["search"]["warnings"]
        assert [fault.sentence in warning for warning in warnings] == [True] * (outcome in (WARNED, CUT_SHORT)), (
            warnings
        )
        assert body["choices"][0]["text"]
    else:
        message = (body.get("error") or body)["message"]
        assert fault.sentence in message
        assert "\n" not in message


@pytest.mark.parametrize(("fault", "phase"), CASES, ids=[f"{fault.name}-{phase}" for fault, phase in CASES])
def test_a_fault_stays_with_its_search(faulty: Faulty, fault: Fault, phase: Phase) -> None:
    outcome, server = fault.outcomes[phase], faulty.server
    fault.before(server)
    counted = searches_counted(server, outcome.counted)
    run = begin(faulty, fault, phase)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask, run, fault)
        hit(pool, run, fault)
        if outcome.status is None:
            assert isinstance(asked.exception(), OSError | http.client.HTTPException)
        else:
            status, answer = asked.result()
            assert status == outcome.status, answer
            assert_says_so(fault, outcome, answer)
    state = server.wait_until_no_search()
    assert state["live"] == 0
    assert searches_counted(server, outcome.counted) == counted + 1
    assert fault.sentence in server.log.read_text(encoding="utf-8", errors="replace")
    assert_served_as_before(server)


def hit(pool: ThreadPoolExecutor, run: Run, fault: Fault) -> None:
    """Act while the search is held in its phase. What the scheduler has to answer is answered afterwards."""
    with held(run.phases, run.rid):
        acting: Future[None] = pool.submit(fault.act, run)
        wait([acting], ACTED_LIMIT_S if fault.act in (hang_up, abort) else TOLD_S)
    acting.result()


# ---- what stock sglang dies of, or stalls on ----

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a prompt without text": ("/generate", {"text": ""}, "at least one token"),
    "a prompt without ids": ("/generate", {"input_ids": [[]]}, "at least one token"),
    "an id below the vocabulary": ("/generate", {"input_ids": [-1]}, "input_ids must be integers from 0 to"),
    "an id beyond it": ("/generate", {"input_ids": [OUT_OF_VOCABULARY]}, "input_ids must be integers from 0 to"),
    "the same in a completion": ("/v1/completions", {"prompt": [-1]}, "input_ids must be integers from 0 to"),
    "a million samples": (
        "/generate",
        {"text": PROMPT, "sampling_params": {"n": 10**6}},
        "n must be at most",
    ),
    "a million completions": ("/v1/completions", {"prompt": PROMPT, "n": 10**6}, "n must be at most"),
    "many prompts, many samples": ("/v1/completions", {"prompt": ["1="] * 1000, "n": 1000}, "n must be at most"),
    "more log probabilities than tokens": (
        "/generate",
        {"text": PROMPT, "return_logprob": True, "top_logprobs_num": 10**7},
        "top_logprobs_num must be at most",
    ),
    "memory that cannot be released": ("/release_memory_occupation", {}, "start it with that flag"),
}


@pytest.mark.parametrize(("path", "body", "sentence"), REFUSED.values(), ids=[*REFUSED])
def test_an_ordinary_request_is_refused_where_sglang_would_die(
    faulty: Faulty, path: str, body: dict[str, Any], sentence: str
) -> None:
    status, text = fetch(faulty.server, path, {"model": "default", **body} if path.startswith("/v1") else body)
    assert status == 400, text
    answer = json.loads(text)
    message = (answer.get("error") or answer)["message"]
    assert sentence in message
    assert "\n" not in message
    assert_served_as_before(faulty.server)


# ---- the server is asked to stop ----


def assert_goes_on_with_new_weights(faulty: Faulty) -> None:
    """Weights that two models share change under a search that waits, and under nobody; the same ones, so the same scores."""
    scores = []
    for phase in PHASES:
        run = begin(faulty, WEIGHTS, phase)
        with ThreadPoolExecutor(2) as pool:
            asked = pool.submit(ask, run, WEIGHTS)
            hit(pool, run, WEIGHTS)
        status, answer = asked.result()
        assert status == 200, answer
        scores.append(json.loads(answer)["choices"][0]["text"])
        assert_served_as_before(faulty.server)
    assert len(set(scores)) == 1


def stopped_in_every_phase(faulty: Faulty, pool: ThreadPoolExecutor) -> list[tuple[int, str]]:
    """Responses of searches, one in each phase, when the server gets SIGTERM; its processes end in time."""
    order: tuple[Phase, ...] = ("rank", "select", "begin", "decode", "score")  # the last one holds up the loop
    runs, asked = [], []
    for phase in order:
        runs.append(begin(faulty, SIGTERM, phase))
        asked.append(pool.submit(ask, runs[-1], LONG_STEPS if phase == "decode" else SIGTERM))
        faulty.phases.wait_for(faulty.phases.reached(runs[-1].rid))
    assert all(faulty.phases.reached(run.rid).exists() for run in runs)
    process = server_process(faulty.server)
    began = time.monotonic()
    process.terminate()
    time.sleep(TOLD_S)  # the loop is held until it has been told
    faulty.phases.go(runs.pop().rid).touch()
    wait(asked, STOP_LIMIT_S)
    for run in runs:
        faulty.phases.go(run.rid).touch()
    psutil.wait_procs([process], STOP_LIMIT_S)
    assert time.monotonic() - began < STOP_LIMIT_S
    return [answer.result(0) for answer in asked]


@pytest.fixture(scope="module")
def retracted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """Steps are retracted all the time, and the PRM shares the policy model's weights. The last test stops it."""
    folder = tmp_path_factory.mktemp("retracted")
    env = {**make_plugin(folder), "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "4"}
    log = folder / "log.txt"
    with suppress(ServerEnded), serving(log, ["--prm-format", "confidence"], env=env) as running:
        yield Faulty(running, Phases(folder))


def test_confidence_is_the_policy_models_own(retracted: Faulty) -> None:
    assert_confident(retracted.server)
    assert "Testing retraction" in retracted.server.log.read_text(encoding="utf-8", errors="replace")


def test_shared_weights_change_under_searches(retracted: Faulty) -> None:
    assert_goes_on_with_new_weights(retracted)


def test_a_server_that_stops_ends_its_searches_at_once(retracted: Faulty) -> None:
    with ThreadPoolExecutor(len(PHASES)) as pool:
        responses = stopped_in_every_phase(retracted, pool)
    for outcome, (status, text) in zip(SIGTERM.outcomes.values(), responses, strict=True):
        assert status == outcome.status, text
        assert_says_so(SIGTERM, outcome, text)
