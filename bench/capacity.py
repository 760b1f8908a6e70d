"""What saved KV is worth: problems per second when the policy model's KV pool holds only a part of what REBASE needs.

    python -m bench.capacity --smoke
    python -m bench.capacity --widths 64 --problems 16 --rounds 3

For each width a server with plenty of KV tells what REBASE needs with `--in-flight` problems at once (the sum of the peaks).
Then, for each share of that, one server runs all policies, interleaved, with all problems at once and with fewer at a time: a
policy is compared at its own best. Releases under pressure and waiting are part of the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from bench import rows
from bench.embedded import TUNED_ETS, held_out_problems
from bench.server import running_server

POLICIES: dict[str, dict[str, Any]] = {
    "best_of_n": {"algorithm": "best_of_n"},
    "beam": {"algorithm": "beam"},
    "dvts": {"algorithm": "dvts"},
    "rebase": {"algorithm": "rebase"},
    "ets_kv b=2": {"algorithm": "ets_kv", "kv_cost_weight": 2.0},
    "ets b=4": TUNED_ETS,
}
AMPLE_TOKENS = 400_000
ANSWER_LIMIT_S = 1800.0


def solve(
    client: httpx.Client, problem: dict[str, Any], search: dict[str, Any], width: int, seed: int
) -> dict[str, Any]:
    """One search: is its answer right, and what did the pool see."""
    body = {"model": "default", "prompt": problem["prompt"], "max_tokens": 512, "seed": seed}
    answer = client.post(
        "/v1/completions", json={**body, "search_width": width, "search": {**search, "early_stop": "off"}}
    )
    if answer.status_code != 200:
        return {"is_right": False, "failed": answer.text[:200], "peak": 0, "releases": 0}
    plain = answer.json()
    is_right = plain["choices"][0]["search"]["answer"] == str(problem["answer"])
    peak, releases = (plain["search"][name] for name in ("kv_tokens_peak", "kv_pressure_releases"))
    return {"is_right": is_right, "failed": "", "peak": peak, "releases": releases}


def run(
    url: str, problems: Sequence[dict[str, Any]], search: dict[str, Any], width: int, seed: int, in_flight: int
) -> dict[str, Any]:
    """All problems under one policy, `in_flight` at a time."""
    with httpx.Client(base_url=url, timeout=ANSWER_LIMIT_S) as client, ThreadPoolExecutor(in_flight) as pool:
        client.post("/flush_cache")
        started = time.monotonic()
        outcomes = list(pool.map(lambda problem: solve(client, problem, search, width, seed), problems))
        seconds = time.monotonic() - started
    return {
        "problems": len(problems),
        "seconds": seconds,
        "problems_per_s": len(problems) / seconds,
        "right": sum(outcome["is_right"] for outcome in outcomes),
        "failed": sum(bool(outcome["failed"]) for outcome in outcomes),
        "releases": sum(outcome["releases"] for outcome in outcomes),
        "peaks": sum(sorted((outcome["peak"] for outcome in outcomes), reverse=True)[:in_flight]),
    }


def need_of_rebase(problems: Sequence[dict[str, Any]], width: int, seed: int, in_flight: int) -> int:
    """Tokens of KV that REBASE holds with so many problems at once, when nothing is short."""
    with running_server(["--search", "ets", "--max-total-tokens", str(AMPLE_TOKENS)]) as url:
        return int(run(url, problems, POLICIES["rebase"], width, seed, in_flight)["peaks"])


def measure(args: argparse.Namespace, out: Path) -> None:
    """One row for each width, share, round, policy and number of problems at a time."""
    problems = held_out_problems(args.problems)
    for width in args.widths:
        need = args.need or need_of_rebase(problems, width, args.seed, args.in_flight[0])
        for share in args.shares:
            pool_tokens = round(need * share)
            with running_server(["--search", "ets", "--max-total-tokens", str(pool_tokens), *args.flags]) as url:
                for number in range(args.rounds):
                    for name in args.policies:
                        for in_flight in args.in_flight:
                            figures = run(url, problems, POLICIES[name], width, args.seed + number, in_flight)
                            key = {"width": width, "policy": name, "in_flight": in_flight, "round": number}
                            pool = {"share": share, "pool_tokens": pool_tokens, "rebase_need_tokens": need}
                            rows.append(out, {**key, **pool, **figures, "flags": args.flags})
                            print(f"{key} {figures}", flush=True)


def table(made: Sequence[dict[str, Any]]) -> str:
    """Medians over rounds: all at once, and at the policy's own best; ratios to REBASE at its best in the same pool.

    A server with more flags stands beside the policy's name.
    """
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in made:
        policy = " ".join([row["policy"], *row["flags"]])
        runs.setdefault((row["width"], row["share"], policy, row["in_flight"]), []).append(row)
    rates = {key: statistics.median(row["problems_per_s"] for row in group) for key, group in runs.items()}
    lines = []
    in_order = sorted(dict.fromkeys(key[:3] for key in rates), key=lambda pool: pool[:2])  # policies as they ran
    for width, share, policy in in_order:
        own = {key[3]: rate for key, rate in rates.items() if key[:3] == (width, share, policy)}
        best = max(own, key=lambda in_flight: own[in_flight])
        rebase = max((rate for key, rate in rates.items() if key[:3] == (width, share, "rebase")), default=0.0)
        group = runs[width, share, policy, best]
        right = f"{sum(row['right'] for row in group)} of {sum(row['problems'] for row in group)}"
        ratio = f"{own[best] / rebase:.2f}x" if rebase else ""
        pool = group[0]["pool_tokens"]
        at_once = own[max(own)]
        line = [width, f"{share:g}", pool, policy, at_once, own[best], best, ratio, f"{at_once / own[best]:.2f}", right]
        lines.append(line)
    header = ["width", "share of REBASE's need", "pool (tokens)", "policy", "all at once (problems/s)", "best (problems/s)",
              "at a time", "best against REBASE's best", "all at once / best", "right"]  # fmt: skip
    return rows.markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--in-flight", type=int, nargs="+", default=[8, 2, 1], help="the first is 'all at once'")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--need", type=int, help="tokens that REBASE needs; default: measured first")
    parser.add_argument("--flags", nargs="*", default=[], help="more for the server: --flags=--search-kv-pressure=4")
    rows.add_arguments(parser, "two problems at width 8 in half of the pool")
    args = parser.parse_args()
    if args.smoke:
        args.widths, args.shares, args.problems, args.rounds, args.in_flight = [8], [0.5], 2, 1, [2, 1]
        args.policies = ["rebase", "ets b=4"]
    out = rows.out_of(args, "capacity")
    measure(args, out)
    rows.publish(out, table(list(rows.read(out))))


if __name__ == "__main__":
    main()
