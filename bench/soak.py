"""Hours in minutes: all policies and widths, ordinary requests, clients that leave, hostile input, pressure in both pools.

    python -m bench.soak --minutes 30
    python -m bench.soak --minutes 3 --smoke

The server is small on purpose. Reported, and the exit status 1 if broken: errors that nobody caused (0), how fast the memory of
each process grows after the warm-up, locks at the end (0), the latency of ordinary requests.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench import rows
from bench.hostile import hostile_request
from bench.server import running_server
from bench.traffic import ANSWER_LIMIT_S, OrdinaryTraffic, locks_when_idle, memory_mb
from sglang_ets.core.registry import BUILT_IN

PROBLEMS = Path(__file__).resolve().parents[1] / "sglang_ets" / "models" / "problems.jsonl"
ALGORITHMS = tuple(BUILT_IN)
WIDTHS = (4, 8, 16, 64, 256)
WIDTH_WEIGHTS = (8, 8, 8, 4, 1)  # a wide search takes as long as many narrow ones
SEARCH_CLIENTS = 3
POOLS = ("--max-total-tokens", "12000", "--prm-max-total-tokens", "12000")
WARM_UP_SHARE = 0.25
SAMPLE_PAUSE_S = 5.0
SLOPE_LIMIT_MB_PER_MIN = 5.0  # flat, as far as a run of minutes can tell
EXPECTED = (200, 400, 429)


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
    locks: int = 0
    warnings: Counter[str] = field(default_factory=Counter)  # kinds that answers carried

    def breaches(self) -> list[str]:
        """What must not be, one sentence each."""
        steep = {name: slope for name, slope in self.slopes_mb_per_min.items() if slope > SLOPE_LIMIT_MB_PER_MIN}
        rules = {
            f"{len(self.errors)} errors that nobody caused": bool(self.errors),
            f"{self.ordinary_failed} of {self.ordinary} ordinary requests failed": bool(self.ordinary_failed),
            f"memory grows: {steep} MB a minute": bool(steep),
            f"{self.locks} locks are left": self.locks > 0,
        }
        return [rule for rule, is_broken in rules.items() if is_broken]


class SoakClients:
    """The clients of a run; each loops until the time is over. `report` is written under a lock."""

    def __init__(self, url: str, report: SoakReport, end_s: float) -> None:
        self._url = url
        self._report = report
        self._end_s = end_s
        self._lock = threading.Lock()
        self._problems = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]

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
        with httpx.Client(base_url=self._url, timeout=ANSWER_LIMIT_S * 5) as client:
            while time.monotonic() < self._end_s:
                body = self._search_body(rng)
                answer = client.post("/v1/completions", json=body)
                self._note(
                    f"search {answer.status_code}", answer.status_code in EXPECTED, f"{body}: {answer.text[:300]}"
                )
                if answer.status_code == 200:
                    self._note_warnings(answer.json())

    def _search_body(self, rng: random.Random) -> dict[str, Any]:
        width = rng.choices(WIDTHS, WIDTH_WEIGHTS)[0]
        search: dict[str, Any] = {"algorithm": rng.choice(ALGORITHMS)}
        if rng.random() < 0.1:
            search["deadline_s"] = rng.choice((0.05, 1.0))
        prompt = rng.choice(self._problems)["prompt"]
        return {"model": "default", "prompt": prompt, "max_tokens": 256, "search_width": width, "search": search}

    def _leavers(self, rng: random.Random) -> None:
        """Streams that are closed after some chunks, and requests whose client gives up."""
        while time.monotonic() < self._end_s:
            body = {**self._search_body(rng), "stream": True}
            chunks = rng.randrange(4)
            try:
                with (
                    httpx.Client(base_url=self._url, timeout=ANSWER_LIMIT_S) as client,
                    client.stream("POST", "/v1/completions", json=body) as answer,
                ):
                    for place, _ in enumerate(answer.iter_lines()):
                        if place >= chunks:
                            break
                    self._note(f"left {answer.status_code}", answer.status_code in EXPECTED, str(body))
            except httpx.HTTPError as error:
                self._note("left: no answer", False, f"{body}: {error!r}")
            time.sleep(rng.random())

    def _hostile(self, rng: random.Random) -> None:
        with httpx.Client(base_url=self._url, timeout=ANSWER_LIMIT_S) as client:
            while time.monotonic() < self._end_s:
                request = hostile_request(rng)
                answer = client.post(request.path, content=request.body, headers={"Content-Type": "application/json"})
                self._note(
                    f"hostile {answer.status_code}", answer.status_code < 500, f"{request.shown()}: {answer.text[:300]}"
                )
                time.sleep(rng.random())

    def _note(self, outcome: str, is_expected: bool, detail: str) -> None:
        with self._lock:
            self._report.outcomes[outcome] += 1
            if not is_expected:
                self._report.errors.append(f"{outcome}: {detail}")

    def _note_warnings(self, answer: dict[str, Any]) -> None:
        with self._lock:
            for warning in answer["metadata"]["search"].get("warnings", ()):
                self._report.warnings[re.sub(r"[\d.]+", "#", warning)] += 1


def soak(url: str, minutes: float, seed: int) -> SoakReport:
    """All clients for so many minutes."""
    report = SoakReport(minutes, seed)
    started = time.monotonic()
    samples: list[tuple[float, dict[str, float]]] = []
    clients = threading.Thread(target=SoakClients(url, report, started + minutes * 60).run)
    with OrdinaryTraffic(url) as ordinary:
        clients.start()
        while clients.is_alive():
            samples.append((time.monotonic() - started, memory_mb(url)))
            clients.join(SAMPLE_PAUSE_S)
    report.ordinary, report.ordinary_failed = len(ordinary.seconds), ordinary.num_failed
    report.ordinary_p50_s, report.ordinary_p99_s = (float(np.quantile(ordinary.seconds, q)) for q in (0.5, 0.99))
    report.slopes_mb_per_min = slopes(samples)
    with httpx.Client(base_url=url, timeout=ANSWER_LIMIT_S) as client:
        report.locks = locks_when_idle(client)
    return report


def slopes(samples: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """MB a minute by process, fitted by least squares to the samples (seconds, MB by process) after the warm-up."""
    after = [sample for sample in samples if sample[0] >= WARM_UP_SHARE * samples[-1][0]]
    minutes = [seconds / 60 for seconds, _ in after]
    if len(after) < 3:
        return {}
    return {
        name: float(np.polyfit(minutes, [memory.get(name, 0.0) for _, memory in after], 1)[0]) for name in after[-1][1]
    }


def table(made: Sequence[dict[str, Any]]) -> str:
    """One line a run."""
    header = [
        "minutes",
        "searches answered",
        "refused",
        "clients that left",
        "hostile requests",
        "errors that nobody caused",
    ]
    header += ["ordinary requests", "p50 (s)", "p99 (s)", "memory (MB a minute)", "locks left"]
    lines = []
    for row in made:
        counts: Counter[str] = Counter()
        for outcome, count in row["outcomes"].items():
            kind, _, status = outcome.partition(" ")
            counts[kind if kind != "search" else f"search {status}"] += count
        slopes_text = ", ".join(f"{name} {slope:+.1f}" for name, slope in row["slopes_mb_per_min"].items())
        refused = counts["search 400"] + counts["search 429"]
        line = [
            f"{row['minutes']:g}",
            counts["search 200"],
            refused,
            counts["left"],
            counts["hostile"],
            row["num_errors"],
        ]
        line += [row["ordinary"], row["ordinary_p50_s"], row["ordinary_p99_s"], slopes_text, row["locks"]]
        lines.append(line)
    return rows.markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "half a minute")
    args = parser.parse_args()
    minutes = 0.5 if args.smoke else args.minutes
    with running_server(["--search", "ets", *POOLS]) as url:
        report = soak(url, minutes, args.seed)
    breaches = report.breaches()
    row = {**vars(report), "errors": report.errors[:20], "num_errors": len(report.errors), "breaches": breaches}
    rows.append(rows.out_of(args, "soak"), row)
    print(table([row]))
    print(json.dumps(row, indent=2))
    sys.exit(bool(breaches))


if __name__ == "__main__":
    main()
