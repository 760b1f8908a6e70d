"""Hostile and generated requests against a real server: it must refuse or answer each, quickly, and stay as it was.

    python -m bench.fuzz --requests 5000            starts a server on the embedded models
    python -m bench.fuzz --requests 500 --url http://127.0.0.1:30000 --seed 7

A seed names the requests of one state of the code: hypothesis puts constants of the files at hand among what it generates.

Half of the requests come from `bench.hostile`, half from schemathesis over `/openapi.json`. Meanwhile an ordinary request is
sent twice a second. Reported, and the exit status 1 if broken: answers of 5xx that are no documented fault, the slowest
ordinary request, growth of the server's memory, locks that are left. `--out FILE` adds a row to a file.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from bench import rows
from bench.hostile import PATHS, HostileRequest, hostile_request
from bench.server import running_server
from bench.traffic import OrdinaryTraffic, locks_when_idle, memory_mb

CLIENTS = 4
ANSWER_LIMIT_S = 120.0
LIMITS = httpx.Limits(keepalive_expiry=1.0)  # the server closes idle connections after 5 s
STALL_LIMIT_S = 2.0
GROWTH_LIMIT_MB = 300  # caches of the interpreter and the allocator fill up; a leak of one large request would pass it
JSON_BODY = {"Content-Type": "application/json"}
STREAM_ERROR = 'data: {"error"'


@dataclass(frozen=True)
class Fault:
    """A 5xx that docs/limits.md names. It is known by what the request sets and by the whole message of the answer."""

    status: int
    fields: tuple[str, ...]  # the request sets one of these at least
    message: str  # a regular expression

    def explains(self, request: HostileRequest, status: int, message: str) -> bool:
        is_asked_for = not request.fields().isdisjoint(self.fields)
        return status == self.status and is_asked_for and re.fullmatch(self.message, message, re.DOTALL) is not None


FAULTS = {
    "a grammar that no token of the model fits": Fault(
        500,
        ("regex", "ebnf", "json_schema", "response_format"),
        r"Grammar accept_token failed: Tokens not accepted: \d+\nAccepted tokens: \[[\d, ]*\]\nKey string: .*",
    ),
    "a search without an answer": Fault(
        500, ("search_width", "custom_params"), r"search failed: no trajectory was completed \(\w+\)(; raise \w+)?"
    ),
    "a deadline before any text": Fault(
        504,
        ("search_width", "custom_params"),
        r"deadline_s of [\d.e+-]+ passed before the search had any text; raise it, or send fewer requests at once",
    ),
}


def fault_of(request: HostileRequest, status: int, message: str) -> str | None:
    """The documented fault that explains an answer."""
    return next((name for name, fault in FAULTS.items() if fault.explains(request, status, message)), None)


@dataclass
class FuzzReport:
    """What a run saw. `undocumented` and `unanswered` name the requests, `faults` counts those of `FAULTS`."""

    seed: int
    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    undocumented: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    ordinary: int = 0
    ordinary_failed: int = 0
    slowest_ordinary_s: float = 0.0
    grown_mb: float = 0.0
    locks: int = 0

    def breaches(self, stall_limit_s: float = STALL_LIMIT_S) -> list[str]:
        """What must not be, one sentence each; empty for a sound server."""
        rules = {
            f"{len(self.undocumented)} answers of 5xx are no documented fault": bool(self.undocumented),
            f"{len(self.unanswered)} requests got no answer": bool(self.unanswered),
            f"{self.ordinary_failed} of {self.ordinary} ordinary requests failed": bool(self.ordinary_failed),
            f"an ordinary request took {self.slowest_ordinary_s:.1f} s": self.slowest_ordinary_s > stall_limit_s,
            f"memory grew by {self.grown_mb:.0f} MB": self.grown_mb > GROWTH_LIMIT_MB,
            f"{self.locks} locks are left": self.locks > 0,
        }
        return [rule for rule, is_broken in rules.items() if is_broken]


def fuzz(url: str, num_requests: int, seed: int) -> FuzzReport:
    """Send the requests of this seed and watch the server."""
    report = FuzzReport(seed)
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=ANSWER_LIMIT_S, limits=LIMITS) as client:
        _send_all(client, [hostile_request(rng) for _ in range(num_requests // 20 + 1)], FuzzReport(seed))  # warm-up
        before = sum(memory_mb(url).values())
        with OrdinaryTraffic(url) as ordinary:
            _send_all(client, [hostile_request(rng) for _ in range(num_requests // 2)], report)
            _send_generated(url, client, num_requests - num_requests // 2, report)
        report.ordinary, report.ordinary_failed = len(ordinary.seconds), ordinary.num_failed
        report.slowest_ordinary_s = max(ordinary.seconds, default=0.0)
        report.locks = locks_when_idle(client)
        report.grown_mb = sum(memory_mb(url).values()) - before
    return report


def _send_all(client: httpx.Client, requests: Sequence[HostileRequest], report: FuzzReport) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = pool.map(lambda request: _send(client, request, report), requests)
        for _ in tqdm(answers, total=len(requests), unit="request"):
            pass


def _send(client: httpx.Client, request: HostileRequest, report: FuzzReport) -> None:
    post = partial(client.post, request.path, content=request.body, headers=JSON_BODY)
    try:
        try:
            answer = post()
        except (httpx.ReadError, httpx.RemoteProtocolError):  # the server closes a connection behind its answer of 500
            answer = post()
    except httpx.HTTPError as error:
        report.unanswered.append(f"{request.shown()}: {type(error).__name__}")
        return
    status, message = outcome_of(answer)
    report.statuses[status] += 1
    name = fault_of(request, status, message)
    if name is not None:
        report.faults[name] += 1
    elif status >= 500:
        report.undocumented.append(f"{request.shown()}: {status} {answer.text[:200]}")


def outcome_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and message of an answer; of a stream that ends with an error event, those of the event."""
    lines = [line for line in answer.text.split("\n") if line.startswith(STREAM_ERROR)]
    text = lines[-1].removeprefix("data: ") if lines else answer.text
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return answer.status_code, text
    error = body.get("error", body) if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return answer.status_code, text
    code = error.get("code")
    return (code if lines and isinstance(code, int) else answer.status_code), str(error.get("message", text))


def _send_generated(url: str, client: httpx.Client, count: int, report: FuzzReport) -> None:
    """Bodies that fit the schema of `/openapi.json`, as schemathesis makes them."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for path in PATHS:
        bodies = _examples(schema[path]["POST"].as_strategy(), -(-count // len(PATHS)), report.seed)
        _send_all(client, [HostileRequest(path, _encoded(body)) for body in bodies], report)


def _encoded(body: dict[str, Any]) -> bytes:
    """As JSON; what schemathesis makes that JSON has not becomes text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(plain(body), default=str).encode("utf-8", "surrogatepass")


def _examples(cases: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of so many cases that this strategy makes from this seed."""
    import hypothesis

    bodies: list[dict[str, Any]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def collect(case: Any) -> None:
        bodies.append(_small(case.body if isinstance(case.body, dict) else {}))

    collect()
    return bodies


def _small(body: dict[str, Any]) -> dict[str, Any]:
    """The body with a limit on what it may generate: a run is about what a server takes, not about long answers."""
    limits = {"max_tokens": 4, "max_completion_tokens": 4}
    small = {key: limits.get(key, value) if isinstance(value, int) else value for key, value in body.items()}
    return {"max_tokens": 4, **small}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    parser.add_argument("--url", help="a running local server; default: start one with the embedded models")
    parser.add_argument("--out", type=Path, help="add the figures to this file as a row")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    if args.url:
        report = fuzz(args.url, args.requests, args.seed)
    else:
        with running_server(["--search", "ets"]) as url:
            report = fuzz(url, args.requests, args.seed)
    row = {**vars(report), "breaches": report.breaches()}
    print(json.dumps(row, indent=2))
    if args.out:
        rows.append(args.out, row)
    sys.exit(bool(report.breaches()))


if __name__ == "__main__":
    main()
