"""Accuracy against KV footprint: search policies x widths on held-out problems of the embedded task.

    python -m bench.kv_footprint --smoke                      a few problems, a minute
    python -m bench.kv_footprint --widths 16 64 --problems 200
    python -m bench.kv_footprint --url http://127.0.0.1:30000  against a server that runs already

Every problem is one row of `--out` (JSONL); a run that was interrupted goes on where it stopped. Greedy decoding and
self-consistency come from the same server through ordinary requests; all other policies are searches.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from bench import rows
from bench.footprint_tables import equal_cost_tables, plot, table
from bench.redundancy import redundancy, tree_of
from bench.server import Places, running_server

PROBLEMS = Path(__file__).resolve().parents[1] / "sglang_ets" / "models" / "problems.jsonl"
ANSWER = re.compile(r"The answer is (-?\d+)")
MAX_TOKENS = 512
LOOP_COSTS = ("loop_blocked_ms_max", "level_loop_ms_mean", "level_loop_ms_max")


@dataclass(frozen=True)
class Setting:
    """One line of the table: a policy and what it is asked for."""

    name: str
    width: int
    search: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.name}@{self.width}"


def settings(widths: list[int], kv_weights: list[float], kv_costs: list[str]) -> list[Setting]:
    """Greedy once; per width self-consistency, the four plain policies and ETS at each cost and cost weight.

    `ets` covers by reward, `ets uniform` as published.
    """
    made = [Setting("greedy", 1, {})]
    for width in widths:
        made.append(Setting("self_consistency", width, {}))
        made += [Setting(name, width, {"algorithm": name}) for name in ("best_of_n", "beam", "dvts", "rebase")]
        for weight, cost in product(kv_weights, kv_costs):
            search = {"kv_cost_weight": weight, "kv_cost": cost}
            suffix = f"b={weight:g}" if cost == "tokens" else f"b={weight:g} {cost}"
            made.append(Setting(f"ets_kv {suffix}", width, {"algorithm": "ets_kv", **search}))
            made.append(Setting(f"ets {suffix}", width, {"algorithm": "ets", "coverage": "reward", **search}))
            made.append(Setting(f"ets uniform {suffix}", width, {"algorithm": "ets", "coverage": "uniform", **search}))
    return made


def solve(client: openai.OpenAI, setting: Setting, problem: dict[str, Any], seed: int) -> dict[str, Any]:
    """One problem under one setting: is the answer right, and what did it cost."""
    started = time.perf_counter()
    body: dict[str, Any] = {"model": "default", "prompt": problem["prompt"], "max_tokens": MAX_TOKENS, "seed": seed}
    if setting.search:
        response = client.completions.create(
            **body,
            temperature=1.0,
            extra_body={"search_width": setting.width, "search": {**setting.search, "return_tree": True}},
        )
        search = dict(response.metadata["search"])  # type: ignore[attr-defined]
        answer = _answer(response.choices[0].text)
        cost = {
            key: search[key] for key in ("kv_tokens_mean", "kv_tokens_peak", "kv_retained_mean", "prm_tokens", "levels")
        }
        cost["kv_referenced_mean"] = search["kv_referenced_mean"]
        cost["fallbacks"] = search["solver"]["fallbacks"]
        cost |= {key: search["solver"][key] for key in LOOP_COSTS}
        cost |= asdict(redundancy(tree_of(response)["nodes"]))
    else:
        response = client.completions.create(**body, n=setting.width, temperature=float(setting.width > 1))
        votes = Counter(found for choice in response.choices if (found := _answer(choice.text)) is not None)
        answer = votes.most_common(1)[0][0] if votes else None
        cost = {}
    return {
        "setting": setting.key,
        "policy": setting.name,
        "width": setting.width,
        "problem": problem["prompt"],
        "seed": seed,
        "answer": answer,
        "is_right": answer == str(problem["answer"]),
        "completion_tokens": response.usage.completion_tokens,
        "latency_s": time.perf_counter() - started,
        **cost,
    }


def _answer(text: str) -> str | None:
    found = ANSWER.findall(text)
    return found[-1] if found else None


@contextmanager
def _clients(url: str | None, num_servers: int, flags: Sequence[str]) -> Iterator[list[openai.OpenAI]]:
    with ExitStack() as stack:
        all_flags = ["--search", "ets", *flags]
        urls = [url] if url else [stack.enter_context(running_server(all_flags)) for _ in range(num_servers)]
        yield [openai.OpenAI(base_url=f"{one}/v1", api_key="none", timeout=600, max_retries=0) for one in urls]


def run_all(
    jobs: Sequence[tuple[Setting, dict[str, Any]]],
    out: Path,
    seed: int,
    *,
    url: str | None = None,
    servers: int = 1,
    in_flight: int = 4,
    flags: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Append one row (and `extra`) to `out` for each job that has none yet, in the order of the jobs.

    Without a `url`, `servers` are started, with `flags`.

    `seconds` of a row is a run's share of its server's time: its latency over the number of runs that were in flight there.
    """
    extra = dict(extra or {})
    known = {
        (row["setting"], row["problem"])
        for row in rows.read(out)
        if row["seed"] == seed and extra.items() <= row.items()
    }
    todo = [job for job in jobs if (job[0].key, job[1]["prompt"]) not in known]
    if not todo:
        return
    with _clients(url, servers, flags) as clients, ThreadPoolExecutor(in_flight * len(clients)) as pool:
        places = Places(clients, in_flight * len(clients))

        def run(job: tuple[Setting, dict[str, Any]]) -> dict[str, Any]:
            with places.lent() as client:
                row = solve(client, *job, seed)
            return row | {"in_flight": in_flight, "seconds": row["latency_s"] / in_flight}

        try:
            for row in tqdm(pool.map(run, todo), total=len(todo), unit="run"):
                rows.append(out, {**row, **extra})
        finally:
            pool.shutdown(cancel_futures=True)  # when interrupted: end what runs, forget what waits


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How a bench of this kind runs."""
    parser.add_argument("--in-flight", type=int, default=4, help="at each server")
    parser.add_argument(
        "--servers", type=int, default=1, help="to start, for more cores; each takes a share of the runs"
    )
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "a few problems at a small width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start one with the embedded models")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--kv-weights", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--kv-costs", nargs="+", default=["tokens"], choices=["tokens", "nodes"])
    parser.add_argument(
        "--only", nargs="+", metavar="POLICY", help="of all policies, by their names in the table, these"
    )
    parser.add_argument("--problems", type=int, default=200)
    add_run_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.widths, args.kv_weights, args.problems = [8], [1.0], 4
    out = rows.out_of(args, "kv_footprint")
    problems = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()][: args.problems]
    chosen = [
        setting
        for setting in settings(args.widths, args.kv_weights, args.kv_costs)
        if not args.only or setting.name in args.only
    ]
    # Problem by problem, so that an interrupted run compares equal sets.
    jobs = [(setting, problem) for problem in problems for setting in chosen]
    run_all(jobs, out, args.seed, url=args.url, servers=args.servers, in_flight=args.in_flight)
    text, summaries = table([row for row in rows.read(out) if row["seed"] == args.seed], args.seed)
    text = f"{text}\n\n{equal_cost_tables(summaries)}\n"
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(summaries, out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
