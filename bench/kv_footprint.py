"""Accuracy against KV footprint: search policies x widths on held-out problems of the embedded task.

    python bench/kv_footprint.py --smoke                      a few problems, a minute
    python bench/kv_footprint.py --widths 16 64 --problems 200
    python bench/kv_footprint.py --url http://127.0.0.1:30000  against a server that runs already

Every problem is one row of `--out` (JSONL); a run that was interrupted goes on where it stopped. Greedy decoding and
self-consistency come from the same server through ordinary requests; all other policies are searches.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import openai
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import rows
from bench.redundancy import redundancy, tree_of
from bench.server import running_server

PROBLEMS = Path(__file__).resolve().parents[1] / "sglang_ets" / "models" / "problems.jsonl"
ANSWER = re.compile(r"The answer is (-?\d+)")
MAX_TOKENS = 256
BASELINE = "rebase"
NUM_RESAMPLES = 2000


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
        cost["loop_blocked_ms_max"] = search["solver"]["loop_blocked_ms_max"]
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
        "seconds": time.perf_counter() - started,
        **cost,
    }


def _answer(text: str) -> str | None:
    found = ANSWER.findall(text)
    return found[-1] if found else None


def interval(right: list[bool], base: list[bool], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy difference, paired by problem."""
    draw = random.Random(seed)
    pairs = list(zip(right, base, strict=True))
    means = sorted(
        sum(int(a) - int(b) for a, b in draw.choices(pairs, k=len(pairs))) / len(pairs) for _ in range(NUM_RESAMPLES)
    )
    return means[int(0.025 * NUM_RESAMPLES)], means[int(0.975 * NUM_RESAMPLES)]


def table(done: list[dict[str, Any]], seed: int) -> tuple[str, list[dict[str, Any]]]:
    """A markdown table and one summary per setting, KV and accuracy against REBASE of the same width."""
    by_setting: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in done:
        by_setting[row["setting"]][row["problem"]] = row
    for width in {row["width"] for row in done}:  # an interrupted run compares only what every policy has solved
        same = [cases for cases in by_setting.values() if next(iter(cases.values()))["width"] == width]
        shared = set.intersection(*(set(cases) for cases in same))
        for cases in same:
            for problem in set(cases) - shared:
                del cases[problem]
    summaries = [_summary(cases, by_setting, seed) for cases in by_setting.values() if cases]
    summaries.sort(key=lambda s: (s["width"], s["policy"]))
    header = ["policy", "width", "problems", "accuracy", "vs REBASE (95 %)", "KV mean", "KV peak", "KV reduction",
              "tokens generated", "PRM tokens", "levels", "s/problem"]  # fmt: skip
    cells = [
        [
            s["policy"], s["width"], s["problems"], s["accuracy"],
            f"{s['difference']:+.3f} [{s['low']:+.3f}, {s['high']:+.3f}]" if "low" in s else "",
            *(s.get(key, "") for key in ("kv_tokens_mean", "kv_tokens_peak", "kv_reduction")),
            s["completion_tokens"], s.get("prm_tokens", ""), s.get("levels", ""), s["seconds"],
        ]
        for s in summaries
    ]  # fmt: skip
    return rows.markdown(header, cells), summaries


def _summary(cases: dict[str, Any], by_setting: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    some = next(iter(cases.values()))
    mean = {
        key: sum(row[key] for row in cases.values()) / len(cases)
        for key in (
            "kv_tokens_mean",
            "kv_tokens_peak",
            "kv_referenced_mean",
            "completion_tokens",
            "prm_tokens",
            "levels",
            "seconds",
        )
        if key in some
    }
    made = {"policy": some["policy"], "width": some["width"], "problems": len(cases), **mean}
    made["accuracy"] = sum(row["is_right"] for row in cases.values()) / len(cases)
    base = by_setting.get(f"{BASELINE}@{some['width']}", {})
    shared = [problem for problem in cases if problem in base]
    if shared and some["policy"] != BASELINE:
        right = [cases[problem]["is_right"] for problem in shared]
        reference = [base[problem]["is_right"] for problem in shared]
        made["difference"] = (sum(right) - sum(reference)) / len(shared)
        made["low"], made["high"] = interval(right, reference, seed)
    if shared and "kv_tokens_mean" in some:
        held = [sum(side[problem]["kv_tokens_mean"] for problem in shared) for side in (base, cases)]
        made["kv_reduction"] = held[0] / held[1]
    return made


def plot(summaries: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against KV held, one panel per width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    searched = [s for s in summaries if "kv_tokens_mean" in s]
    widths = sorted({s["width"] for s in searched})
    figure, axes = pyplot.subplots(1, len(widths), figsize=(5 * len(widths), 4), squeeze=False)
    for axis, width in zip(axes[0], widths, strict=True):
        for s in (s for s in searched if s["width"] == width):
            axis.scatter(s["kv_tokens_mean"], s["accuracy"])
            axis.annotate(s["policy"], (s["kv_tokens_mean"], s["accuracy"]), fontsize=7)
        axis.set(title=f"width {width}", xlabel="KV tokens held (mean over levels)", ylabel="accuracy")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@contextmanager
def _clients(url: str | None, num_servers: int) -> Iterator[list[openai.OpenAI]]:
    with ExitStack() as stack:
        urls = [url] if url else [stack.enter_context(running_server(["--search", "ets"])) for _ in range(num_servers)]
        yield [openai.OpenAI(base_url=f"{one}/v1", api_key="none", timeout=600, max_retries=0) for one in urls]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start one with the embedded models")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--kv-weights", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--kv-costs", nargs="+", default=["tokens"], choices=["tokens", "nodes"])
    parser.add_argument(
        "--equal-weights", type=float, nargs="+", default=[4.0], help="of both KV and coverage, for ets"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="POLICY", help="of all policies, by their names in the table, these"
    )
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--in-flight", type=int, default=4, help="at each server")
    parser.add_argument(
        "--servers", type=int, default=1, help="to start, for more cores; each takes a share of the runs"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="4 problems at width 8, into a file of its own")
    parser.add_argument("--out", type=Path, help="rows, JSONL; default bench/results/kv_footprint.jsonl")
    args = parser.parse_args()
    if args.smoke:
        args.widths, args.kv_weights, args.problems = [8], [1.0], 4
    out = args.out or rows.RESULTS / ("kv_footprint_smoke.jsonl" if args.smoke else "kv_footprint.jsonl")
    problems = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()][: args.problems]
    known = {(row["setting"], row["problem"], row["seed"]) for row in rows.read(out)}
    todo = [
        (setting, problem)
        for problem in problems  # problem by problem, so that an interrupted run compares equal sets
        for setting in settings(args.widths, args.kv_weights, args.kv_costs)
        if (not args.only or setting.name in args.only) and (setting.key, problem["prompt"], args.seed) not in known
    ]
    with _clients(args.url, args.servers) as clients, ThreadPoolExecutor(args.in_flight * len(clients)) as pool:
        free = SimpleQueue[openai.OpenAI]()
        for client in clients * args.in_flight:
            free.put(client)

        def run(job: tuple[Setting, dict[str, Any]]) -> dict[str, Any]:
            client = free.get()
            try:
                return solve(client, *job, args.seed)
            finally:
                free.put(client)

        for row in tqdm(pool.map(run, todo), total=len(todo), unit="run"):
            rows.append(out, row)
    text, summaries = table([row for row in rows.read(out) if row["seed"] == args.seed], args.seed)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    plot(summaries, out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
