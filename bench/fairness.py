"""Ordinary requests beside a wide search: time to first token and time per token, against those beside plain sampling.

    python -m bench.fairness --smoke
    python -m bench.fairness --width 256 --rounds 5

One server. In turns it runs one search of `--width`, the same number of plain sequences, and nothing; meanwhile ordinary
requests of 32 tokens are streamed one after another.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench import rows
from bench.embedded import held_out_problems
from bench.server import running_server

ORDINARY_TOKENS = 32
PAUSE_S = 0.2
ANSWER_LIMIT_S = 900.0
LOADS = ("search", "plain", "nothing")
QUIET_S = 6.0  # how long "nothing" lasts


def ordinary(client: httpx.Client, prompt: str) -> tuple[float, float]:
    """Seconds to the first token, and per token after it."""
    body = {"model": "default", "prompt": prompt, "max_tokens": ORDINARY_TOKENS, "ignore_eos": True, "stream": True}
    started = time.perf_counter()
    times = []
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times[0] - started, (times[-1] - times[0]) / (ORDINARY_TOKENS - 1)


def load_of(kind: str, url: str, prompt: str, args: argparse.Namespace, seed: int) -> Callable[[], None]:
    """What keeps the server busy meanwhile."""
    body: dict[str, Any] = {"model": "default", "prompt": prompt, "max_tokens": 256, "temperature": 1.0, "seed": seed}
    if kind == "search":
        body |= {"search_width": args.width, "search": {"algorithm": args.algorithm}}
    else:
        body |= {"n": args.width}

    def run() -> None:
        if kind == "nothing":
            time.sleep(QUIET_S)
            return
        httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_LIMIT_S).raise_for_status()

    return run


def beside(load: Callable[[], None], client: httpx.Client, prompt: str) -> list[tuple[float, float]]:
    """Ordinary requests until the load has ended; those that were begun before its end count."""
    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(PAUSE_S)
    measured = []
    while thread.is_alive():
        measured.append(ordinary(client, prompt))
        time.sleep(PAUSE_S)
    thread.join()
    return measured


def measure(args: argparse.Namespace, out: Path) -> None:
    """One row for each round and load."""
    problems = held_out_problems()
    with (
        running_server(["--search", "ets", *args.flags]) as url,
        httpx.Client(base_url=url, timeout=ANSWER_LIMIT_S) as client,
    ):
        ordinary(client, problems[-1]["prompt"])
        for number in range(args.rounds):
            for kind in LOADS:
                load = load_of(kind, url, problems[number]["prompt"], args, number)
                measured = beside(load, client, problems[-1 - number]["prompt"])
                figures = {
                    "first_token_s": [first for first, _ in measured],
                    "per_token_s": [per_token for _, per_token in measured],
                }
                row = {"load": kind, "width": args.width, "algorithm": args.algorithm, "round": number, **figures}
                rows.append(out, row)
                medians = {key: statistics.median(values) for key, values in figures.items() if values}
                print(kind, number, medians, flush=True)


def table(made: Sequence[dict[str, Any]]) -> str:
    """Medians and worst over all ordinary requests of a load, and ratios to plain sampling."""
    header = ["width", "algorithm", "beside", "ordinary requests", "first token: median (s)", "worst (s)",
              "per token: median (s)"]  # fmt: skip
    lines = []
    for width, algorithm in dict.fromkeys((row["width"], row["algorithm"]) for row in made):
        own = [row for row in made if (row["width"], row["algorithm"]) == (width, algorithm)]
        medians = {}
        for kind in LOADS:
            first, per_token = (
                [value for row in own if row["load"] == kind for value in row[key]]
                for key in ("first_token_s", "per_token_s")
            )
            if not first:
                continue
            medians[kind] = (statistics.median(first), statistics.median(per_token))
            lines.append([width, algorithm, kind, len(first), medians[kind][0], max(first), medians[kind][1]])
        if {"search", "plain"} <= medians.keys():
            ratios = [search / plain for search, plain in zip(medians["search"], medians["plain"], strict=True)]
            lines.append([width, algorithm, "search / plain", "", f"{ratios[0]:.2f}x", "", f"{ratios[1]:.2f}x"])
    return rows.markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--algorithm", default="rebase")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags for the server")
    rows.add_arguments(parser, "one round at width 8")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.rounds = 8, 1
    out = rows.out_of(args, "fairness")
    measure(args, out)
    rows.publish(out, table(list(rows.read(out))))


if __name__ == "__main__":
    main()
