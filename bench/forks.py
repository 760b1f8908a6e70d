"""What it is worth that children start in the running batch, that nodes of equal tokens share a row of it, and that good leaves
go on while a level's longest steps end.

    python -m bench.forks --smoke
    python -m bench.forks --widths 16 64 --rounds 3
    python -m bench.forks --model-path FOLDER --data gsm8k --widths 4 16 --modes extend shared     # a model of your own

Servers that differ in `--search-forks` alone, and one that shares rows and speculates, solve the same problems with the same
seeds, in turns within each round; those that are not measured are frozen. Their trees must be equal, node by node, so the rows
compare time and nothing else: the bench ends with an error if one tree differs. A model of your own judges itself
(`--prm-format`) and is asked in chats about the problems of a data set that are left for validation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from bench import rows
from bench.client_search.processes import Running, awake, running, search_flags
from bench.embedded import EMBEDDED, TUNED_ETS, client_of, held_out_problems
from bench.trees import grow, growth, num_distinct_prefixes
from sglang_ets.engine.live import ForkMode
from sglang_ets.tools.datasets import load

SPECULATE = "speculate"
MODES: dict[str, list[str]] = {  # and the flags of its server
    **{mode: ["--search-forks", mode] for mode in get_args(ForkMode)[::-1]},
    SPECULATE: ["--search-forks", "shared", "--search-speculate"],
}
POLICIES: dict[str, dict[str, Any]] = {
    "rebase": {"algorithm": "rebase"},
    "ets b=4": TUNED_ETS,
    "best_of_n": {"algorithm": "best_of_n"},
}
POOL_TOKENS = 100_000  # nothing is short
OWN_POOL_TOKENS = 20_000  # of a model of one's own, whose tokens are larger
GUESSES = ("children", "children_used", "tokens_wasted")  # of speculation
MAX_TOKENS = 512


@dataclass(frozen=True)
class Task:
    """A model with its problems."""

    model: str
    flags: Sequence[str]  # of a server
    prompts: Sequence[str]
    max_tokens: int
    is_chat: bool

    @classmethod
    def embedded(cls, max_tokens: int = MAX_TOKENS) -> Task:
        prompts = [problem["prompt"] for problem in held_out_problems()]
        return cls(EMBEDDED, search_flags(POOL_TOKENS), prompts, max_tokens, is_chat=False)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Task:
        """The embedded models, or the model that the arguments name."""
        if args.model_path is None:
            return cls.embedded(args.max_tokens)
        model = ["--model-path", args.model_path, "--prm-format", args.prm_format, "--dtype", args.dtype]
        no_penalty = ["--sampling-defaults", "openai"]  # a generation_config.json may have one, which forbids sharing
        flags = [*search_flags(OWN_POOL_TOKENS), *model, *no_penalty]
        prompts = [problem.prompt for problem in load(args.data, split="validation")]
        return cls(Path(args.model_path).name, flags, prompts, args.max_tokens, is_chat=True)


def solve(url: str, task: Task, prompt: str, policy: str, width: int, seed: int) -> tuple[dict[str, Any], float]:
    """The figures of one search, with its tree, and how long the client waited."""
    started = time.monotonic()
    client, settings = client_of(url, timeout_s=1800), {**POLICIES[policy], "early_stop": "off"}
    answer = grow(client, prompt, width, settings, is_chat=task.is_chat, max_tokens=task.max_tokens, seed=seed)
    return {"completion_tokens": answer.usage.completion_tokens, **answer.search}, time.monotonic() - started


def measure(
    server: Running, task: Task, prompts: Sequence[str], policy: str, width: int, seed: int, in_flight: int
) -> tuple[dict[str, Any], list[list[tuple[Any, ...]]]]:
    """One round of one server: its figures, and how its trees grew."""
    with awake([server]), ThreadPoolExecutor(in_flight) as pool:
        cpu_s, started = server.cpu_s(), time.monotonic()
        made = list(pool.map(lambda prompt: solve(server.url, task, prompt, policy, width, seed), prompts))
        seconds, cpu_s = time.monotonic() - started, server.cpu_s() - cpu_s
    trees = [one["tree"]["nodes"] for one, _ in made]
    figures = {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "latency_s": statistics.median(latency for _, latency in made),
        "problems": len(prompts),
        "completion_tokens": sum(one["completion_tokens"] for one, _ in made),
        "tokens_computed": sum(one["tokens_computed"] for one, _ in made),
        "distinct_prefixes": sum(map(num_distinct_prefixes, trees)),
    }
    guesses = [one["speculation"] for one, _ in made if one["speculation"]]
    figures |= {name: sum(one[name] for one in guesses) for name in GUESSES if guesses}
    return figures, [growth(nodes) for nodes in trees]


def run(args: argparse.Namespace, out: Any) -> None:
    """One row for each width, number in flight, policy, round and mode.

    Raises:
        SystemExit: trees of two modes differ.
    """
    task = Task.of(args)
    with running([[*task.flags, *MODES[mode]] for mode in args.modes]) as servers:
        for server in servers:  # the first searches compile and load; they are not measured
            measure(server, task, task.prompts[-1:], "rebase", args.widths[0], args.seed, 1)
        rounds = [
            (w, f, p, n) for n in range(args.rounds) for w in args.widths for f in args.in_flight for p in args.policies
        ]
        for width, in_flight, policy, number in tqdm(rounds, unit="round"):
            here = task.prompts[number * args.problems : (number + 1) * args.problems]
            expected: list[Any] | None = None
            turn = number % len(args.modes)
            for place in [*range(turn, len(args.modes)), *range(turn)]:
                figures, trees = measure(servers[place], task, here, policy, width, args.seed, in_flight)
                if expected is not None and trees != expected:
                    sys.exit(
                        f"{' '.join(MODES[args.modes[place]])} grew other trees: {policy}, width {width}, round {number}"
                    )
                expected = trees
                key = {"model": task.model, "mode": args.modes[place], "policy": policy, "width": width}
                key |= {"in_flight": in_flight, "round": number, "max_tokens": task.max_tokens}
                rows.append(out, {**key, "seed": args.seed, **figures})


def table(made: Sequence[dict[str, Any]]) -> str:
    """Medians over rounds of each mode, and each against `extend` in the same round."""
    by_key: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in made:
        model = row.get("model", EMBEDDED)
        by_key.setdefault((model, row["width"], row["in_flight"], row["policy"], row["mode"]), {})[row["round"]] = row
    lines = []
    for (model, width, in_flight, policy, mode), of_round in sorted(by_key.items()):
        base = by_key[model, width, in_flight, policy, "extend"]
        ratio = statistics.median(base[number]["seconds"] / row["seconds"] for number, row in of_round.items())
        cpu = statistics.median(base[number]["cpu_s"] / row["cpu_s"] for number, row in of_round.items())
        total = {name: sum(row[name] for row in of_round.values()) for name in next(iter(of_round.values()))
                 if name in ("seconds", "problems", "completion_tokens", "tokens_computed", "distinct_prefixes")}  # fmt: skip
        lines.append([
            model, width, in_flight, policy, mode, total["problems"], total["seconds"] / total["problems"], f"{ratio:.2f}x",
            f"{cpu:.2f}x", f"{total['tokens_computed'] / total['completion_tokens']:.2f}",
            f"{total['tokens_computed'] / total['distinct_prefixes']:.2f}", guesses_of(of_round.values()),
        ])  # fmt: skip
    header = ["model", "width", "at a time", "policy", "forks", "problems", "s/problem", "speed against extend",
              "the same in CPU time", "computed / generated", "computed / distinct", "guesses used; waste"]  # fmt: skip
    return rows.markdown(header, lines)


def guesses_of(made: Collection[dict[str, Any]]) -> str:
    """Of children that began before selection the share that it wanted, and of all computed tokens what the others cost."""
    begun = sum(row.get("children", 0) for row in made)
    if not begun:
        return ""
    used = sum(row["children_used"] for row in made) / begun
    wasted = sum(row["tokens_wasted"] for row in made) / sum(row["tokens_computed"] for row in made)
    return f"{used:.0%} of {begun}; {wasted:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[4, 1], help="problems at a time")
    parser.add_argument("--problems", type=int, default=4, help="of each round, others in each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="`extend` must be one of them")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--model-path", help="default: the embedded models")
    parser.add_argument("--prm-format", default="judge", help="of a model of your own, which judges itself")
    parser.add_argument("--dtype", default="bfloat16", help="of a model of your own")
    parser.add_argument("--data", default="gsm8k", help="for a model of your own")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "one round of one problem at width 8")
    args = parser.parse_args()
    if "extend" not in args.modes:
        parser.error(f"--modes must name extend, with which all are compared, got {' '.join(args.modes)}; add it")
    if args.smoke:
        args.widths, args.in_flight, args.problems, args.rounds = [8], [1], 1, 1
    out = rows.out_of(args, "forks")
    run(args, out)
    rows.publish(out, table(list(rows.read(out))))


if __name__ == "__main__":
    main()
