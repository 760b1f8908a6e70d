"""Hours in minutes: all policies and widths, ordinary requests, clients that leave, hostile input, pressure in both pools.

    python -m bench.soak --minutes 30
    python -m bench.soak --smoke

The server is small on purpose. Reported, and the exit status 1 if broken: errors that nobody caused (0), how fast the memory of
each process grows after the warm-up, locks at the end (0); and the latency of ordinary requests.

Memory is what belongs to a process alone, without the pages of files. The warm-up is left out of its slope: one problem for
each policy at width 64 and requests that load torch's compiler and the grammars, before the clock starts, and then the first
`WARM_UP_SHARE` of the run. The allocator keeps what the widest searches of a moment needed, so growth counts from
`ARENAS_MB` on: a short run sees large leaks only. A deadline that passes without a text (HTTP 504) and a full server (429) are
what a client asked for, and no errors; neither are the faults of sglang that docs/limits.md names (`bench.fuzz.FAULTS`).
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from bench import rows
from bench.embedded import held_out_problems
from bench.fuzz import JSON_BODY, fault_of, outcome_of
from bench.hostile import hostile_request
from bench.server import running_server
from bench.traffic import ANSWER_LIMIT_S, OrdinaryTraffic, locks_when_idle, memory_mb
from sglang_ets.core.registry import BUILT_IN

ALGORITHMS = tuple(BUILT_IN)
WIDTHS = {4: 8, 8: 8, 16: 8, 64: 4, 256: 1}  # and how often: a wide search takes as long as many narrow ones
WARM_UP_WIDTH = 64
SMOKE_WIDTHS = {width: often for width, often in WIDTHS.items() if width <= WARM_UP_WIDTH}
SEARCH_CLIENTS = 3
POOLS = ("--max-total-tokens", "12000", "--prm-max-total-tokens", "12000")
WARM_UP_SHARE = 0.25
SAMPLE_PAUSE_S = 5.0
SEARCH_LIMIT_S = 1800.0  # a wide search in pools this small, beside others, on a busy machine
DEADLINE_SHARE = 0.1  # of the searches
ERROR_CHARS = 300
SLOPE_LIMIT_MB_PER_MIN = 2.0
ARENAS_MB = 50.0
# Ordinary requests for which sglang loads code that it did not need before.
LOADING: tuple[dict[str, Any], ...] = ({"repetition_penalty": 1.1}, {"regex": "[0-9]+"})
EXPECTED = (200, 429)
DEADLINE_PASSED = 504
LIMITS = httpx.Limits(max_keepalive_connections=0)  # the server closes some behind its answer, and those that are idle

Sample = tuple[float, dict[str, float]]  # seconds, and MB by process


@dataclass
class SoakReport:
    """What a run saw."""

    minutes: float
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)  # that nobody caused
    ordinary: int = 0
    ordinary_failed: int = 0
    ordinary_p50_s: float = 0.0
    ordinary_p99_s: float = 0.0
    slopes_mb_per_min: dict[str, float] = field(default_factory=dict)  # by process
    memory_mb: dict[str, tuple[float, float]] = field(default_factory=dict)  # the same, where the fit begins and ends
    locks: int = 0
    warnings: Counter[str] = field(default_factory=Counter)  # kinds that answers carried

    def breaches(self) -> list[str]:
        """What must not be, one sentence each."""
        grown = [name for name, (begin, end) in self.memory_mb.items() if end - begin > ARENAS_MB]
        steep = {name: self.slopes_mb_per_min[name] for name in grown}
        steep = {name: slope for name, slope in steep.items() if slope > SLOPE_LIMIT_MB_PER_MIN}
        rules = {
            f"{len(self.errors)} errors that nobody caused": bool(self.errors),
            f"{self.ordinary_failed} of {self.ordinary} ordinary requests failed": bool(self.ordinary_failed),
            f"memory grows: {steep} MB a minute": bool(steep),
            f"{self.locks} locks are left": self.locks > 0,
        }
        return [rule for rule, is_broken in rules.items() if is_broken]


class SoakClients:
    """The clients of a run; each loops until the time is over. `report` is written under a lock."""

    def __init__(self, url: str, report: SoakReport, end_s: float, widths: Mapping[int, int]) -> None:
        self._url = url
        self._widths = widths
        self._report = report
        self._end_s = end_s
        self._lock = threading.Lock()

    def run(self) -> None:
        """Run all of them to the end."""
        loops = [self._searches] * SEARCH_CLIENTS + [self._leavers, self._hostile]
        threads = [
            threading.Thread(target=loop, args=(random.Random(f"{self._report.seed}/{place}"),))
            for place, loop in enumerate(loops)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _searches(self, rng: random.Random) -> None:
        with self._client() as client:
            while time.monotonic() < self._end_s:
                body = search_body(rng, self._widths)
                with self._answered("search", str(body)):
                    answer = client.post("/v1/completions", json=body)
                    self._note("search", answer.status_code, is_expected(body, answer.status_code), body, answer.text)
                    if answer.status_code == 200:
                        self._note_warnings(answer.json())

    def _leavers(self, rng: random.Random) -> None:
        """Streams that are closed after some chunks, and requests whose client gives up."""
        while time.monotonic() < self._end_s:
            body = {**search_body(rng, self._widths), "stream": True}
            chunks = rng.randrange(4)
            with (
                self._answered("left", str(body)),
                self._client() as client,
                client.stream("POST", "/v1/completions", json=body) as answer,
            ):
                for place, _ in enumerate(answer.iter_lines()):
                    if place >= chunks:
                        break
                self._note("left", answer.status_code, is_expected(body, answer.status_code), body)
            time.sleep(rng.random())

    def _hostile(self, rng: random.Random) -> None:
        with self._client() as client:
            while time.monotonic() < self._end_s:
                request = hostile_request(rng)
                with self._answered("hostile", request.shown()):
                    answer = client.post(request.path, content=request.body, headers=JSON_BODY)
                    status, message = outcome_of(answer)
                    is_sound = status < 500 or fault_of(request, status, message) is not None
                    self._note("hostile", status, is_sound, request.shown(), message)
                time.sleep(rng.random())

    def _client(self) -> httpx.Client:
        """Over http alone, so that no certificates are read, which takes long on a busy machine."""
        return httpx.Client(base_url=self._url, timeout=SEARCH_LIMIT_S, limits=LIMITS, verify=False)

    @contextmanager
    def _answered(self, who: str, request: str) -> Iterator[None]:
        """A request without an answer is an error that nobody caused."""
        try:
            yield
        except httpx.HTTPError as error:
            self._note(who, 0, False, request, repr(error))

    def _note(self, who: str, status: int, is_sound: bool, request: object, answer: str = "") -> None:
        outcome = f"{who} {status or 'unanswered'}"
        with self._lock:
            self._report.outcomes[outcome] += 1
            if not is_sound:
                self._report.errors.append(f"{outcome}: {request}: {answer[:ERROR_CHARS]}")

    def _note_warnings(self, answer: dict[str, Any]) -> None:
        with self._lock:
            for warning in answer["search"].get("warnings", ()):
                self._report.warnings[re.sub(r"[\d.]+", "#", warning)] += 1


def search_body(rng: random.Random, widths: Mapping[int, int]) -> dict[str, Any]:
    """A search that a client may well send."""
    search: dict[str, Any] = {"algorithm": rng.choice(ALGORITHMS)}
    (width,) = rng.choices([*widths], [*widths.values()])
    if rng.random() < DEADLINE_SHARE:
        search["deadline_s"] = rng.choice((0.05, 1.0))
    asked = {"model": "default", "prompt": rng.choice(prompts()), "max_tokens": 256}
    return {**asked, "search_width": width, "search": search}


@functools.cache
def prompts() -> list[str]:
    return [problem["prompt"] for problem in held_out_problems()]


def is_expected(body: dict[str, Any], status: int) -> bool:
    """Whether a search may be answered so: a time that is too short is its client's own."""
    return status in EXPECTED or (status == DEADLINE_PASSED and "deadline_s" in body["search"])


def warm_up(url: str) -> None:
    """One problem for each policy, and what loads code.

    Raises:
        httpx.HTTPStatusError: one is not answered.
    """
    searches = [{"search_width": WARM_UP_WIDTH, "search": {"algorithm": algorithm}} for algorithm in ALGORITHMS]
    with httpx.Client(base_url=url, timeout=SEARCH_LIMIT_S) as client:
        for fields in (*LOADING, *searches):
            body = {"model": "default", "prompt": prompts()[0], "max_tokens": 256, **fields}
            client.post("/v1/completions", json=body).raise_for_status()


def soak(url: str, minutes: float, seed: int, widths: Mapping[int, int]) -> SoakReport:
    """All clients for so many minutes."""
    report = SoakReport(minutes, seed)
    warm_up(url)
    started = time.monotonic()
    samples: list[Sample] = []
    clients = threading.Thread(target=SoakClients(url, report, started + minutes * 60, widths).run)
    with OrdinaryTraffic(url) as ordinary:
        clients.start()
        while clients.is_alive():
            samples.append((time.monotonic() - started, memory_mb(url)))
            clients.join(SAMPLE_PAUSE_S)
    report.ordinary, report.ordinary_failed = len(ordinary.seconds), ordinary.num_failed
    report.ordinary_p50_s, report.ordinary_p99_s = (float(np.quantile(ordinary.seconds, q)) for q in (0.5, 0.99))
    after = after_warm_up(samples)
    report.slopes_mb_per_min = slopes(after)
    report.memory_mb = {name: (after[0][1].get(name, 0.0), memory) for name, memory in after[-1][1].items()}
    with httpx.Client(base_url=url, timeout=ANSWER_LIMIT_S) as client:
        report.locks = locks_when_idle(client)
    return report


def after_warm_up(samples: Sequence[Sample]) -> Sequence[Sample]:
    return [sample for sample in samples if sample[0] >= WARM_UP_SHARE * samples[-1][0]]


def slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """MB a minute by process, fitted by least squares."""
    if len(samples) < 3:
        return {}
    minutes = [seconds / 60 for seconds, _ in samples]
    return {
        name: float(np.polyfit(minutes, [memory.get(name, 0.0) for _, memory in samples], 1)[0])
        for name in samples[-1][1]
    }


HEADER = (
    "minutes", "searches answered", "refused or too late", "clients that left", "hostile requests", "errors that nobody caused",
    "ordinary requests", "p50 (s)", "p99 (s)", "memory (MB)", "growth (MB a minute)", "locks left",
)  # fmt: skip


def table(made: Sequence[dict[str, Any]]) -> str:
    """One line a run."""
    return rows.markdown(HEADER, [_line(row) for row in made])


def _line(row: dict[str, Any]) -> list[Any]:
    outcomes: dict[str, int] = row["outcomes"]
    asked, left, hostile = (
        sum(number for name, number in outcomes.items() if name.startswith(f"{kind} "))
        for kind in ("search", "left", "hostile")
    )
    answered = outcomes.get("search 200", 0)
    line = [f"{row['minutes']:g}", answered, asked - answered, left, hostile, row["num_errors"]]
    line += [row["ordinary"], row["ordinary_p50_s"], row["ordinary_p99_s"]]
    memory = ", ".join(f"{_short(name)} {begin:.0f} to {end:.0f}" for name, (begin, end) in row["memory_mb"].items())
    growth = ", ".join(f"{_short(name)} {slope:+.1f}" for name, slope in row["slopes_mb_per_min"].items())
    return [*line, memory, growth, row["locks"]]


def _short(process: str) -> str:
    return process.removeprefix("sglang::")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "a minute and a half, widths to 64")
    args = parser.parse_args()
    minutes, widths = (1.5, SMOKE_WIDTHS) if args.smoke else (args.minutes, WIDTHS)
    with running_server(["--search", "ets", *POOLS]) as url:
        report = soak(url, minutes, args.seed, widths)
    breaches = report.breaches()
    row = {**vars(report), "errors": report.errors[:20], "num_errors": len(report.errors), "breaches": breaches}
    rows.append(rows.out_of(args, "soak"), row)
    print(table([row]))
    print(json.dumps(row, indent=2))
    sys.exit(bool(breaches))


if __name__ == "__main__":
    main()
