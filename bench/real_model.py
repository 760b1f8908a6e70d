"""A real language model: SmolLM2-135M-Instruct on GSM8K and MATH-500, searched with a PRM that needs no other weights.

    python -m bench.real_model --data gsm8k --smoke
    python -m bench.real_model --data gsm8k math500 --problems 8 --width 8
    python -m bench.real_model --tables                                    # from the rows that are there

Chat requests go through the model's own template and tokenizer. `--prm-format confidence` scores a step by the model's own mean
log-probability of it, `judge` asks the same weights a yes/no question. A model of this size solves next to nothing: what this
shows is KV held, tokens and seconds with a real vocabulary and real steps. Answers are graded by math-verify, and by a
second, stricter grader.

One problem under one setting is a row; a run that was interrupted goes on where it stopped. `--in-flight` problems are solved
at once, each setting for itself, and a row has an equal share of the seconds that they took, of the clock and of the server's
CPU time; the latter means something on a busy machine too. Tables and plot keep data sets, PRM formats and token limits apart.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai
import psutil
from tqdm import tqdm

from bench import rows
from bench.embedded import client_of
from bench.figures import colour, panels
from bench.redundancy import redundancy
from bench.searches import FROM_SEARCH, Setting
from bench.server import running_server
from bench.smollm2 import checkpoint
from bench.tables import by_setting, table
from sglang_ets.core.patterns import extract_answer
from sglang_ets.math_process import MathProcess
from sglang_ets.tools.datasets import Problem, load
from sglang_ets.tools.grading import grade, majority

WARM_UP_TOKENS = 8
POOL_TOKENS = 32_000
STEP = {"step_delimiter": ["\n"], "max_step_tokens": 64}
ANSWERS = "boxed"
POLICIES = ("best_of_n", "beam", "dvts", "rebase", "ets_kv", "ets")
COST_HEADER = ["policy", "width", "KV mean", "KV if unshared", "KV peak", "leaves", "distinct texts", "clusters",
               "tokens a step", "tokens/s", "tokens/CPU s", "answered", "graders disagree"]  # fmt: skip
COST_MEANS = (
    "kv_tokens_mean",
    "kv_referenced_mean",
    "kv_tokens_peak",
    "leaves",
    "distinct_texts",
    "clusters",
    "step_tokens",
)

Group = tuple[str, str, int]  # data set, PRM format, max_tokens: what no table may mix


def settings(width: int, policies: Sequence[str]) -> list[Setting]:
    """Greedy, self-consistency and the searches."""
    plain = [Setting("greedy", 1, {}), Setting("self_consistency", width, {})]
    return plain + [Setting(name, width, {"algorithm": name, **STEP}) for name in policies]


def flags(prm_format: str) -> list[str]:
    """Of a server that judges with the policy model's own weights."""
    return ["--search", "ets", "--model-path", str(checkpoint()), "--prm-format", prm_format, "--dtype", "float32",
            "--max-total-tokens", str(POOL_TOKENS), "--prm-max-total-tokens", str(POOL_TOKENS)]  # fmt: skip


def solve(client: openai.OpenAI, setting: Setting, problem: Problem, max_tokens: int, seed: int) -> rows.Row:
    """One problem under one setting, neither timed nor graded yet."""
    body: dict[str, Any] = {
        "model": "default", "messages": [{"role": "user", "content": problem.prompt}], "max_tokens": max_tokens, "seed": seed,
    }  # fmt: skip
    cost: rows.Row = {}
    if setting.search:
        search = {**setting.search, "answer_pattern": ANSWERS, "return_tree": True}
        response = client.chat.completions.create(
            **body, temperature=1.0, extra_body={"search_width": setting.width, "search": search}
        )
        figures = dict(response.search)  # type: ignore[attr-defined]
        nodes = figures["tree"]["nodes"]
        seen = redundancy(nodes)
        cost = {name: figures[name] for name in FROM_SEARCH} | {"fallbacks": figures["solver"]["fallbacks"]}
        cost |= {"leaves": seen.leaves, "distinct_texts": seen.distinct_texts, "clusters": seen.clusters}
        cost["step_tokens"] = sum(len(node["token_ids"]) for node in nodes) / len(nodes)
        answer = extract_answer(response.choices[0].message.content or "", ANSWERS)
    else:
        response = client.chat.completions.create(**body, n=setting.width, temperature=float(setting.width > 1))
        texts = [choice.message.content or "" for choice in response.choices]
        answer = majority([extract_answer(text, ANSWERS) for text in texts])
    return {
        "setting": setting.key, "policy": setting.name, "width": setting.width, "problem": problem.id,
        "max_tokens": max_tokens, "seed": seed, "answer": answer,
        "completion_tokens": response.usage.completion_tokens if response.usage else 0,
        **cost,
    }  # fmt: skip


def solve_together(
    client: openai.OpenAI, setting: Setting, problems: Sequence[Problem], max_tokens: int, seed: int
) -> list[rows.Row]:
    """All problems in flight at once; each row has an equal share of the time that they took."""
    started, worked = time.perf_counter(), server_cpu_s()
    with ThreadPoolExecutor(len(problems)) as pool:
        done = list(pool.map(lambda problem: solve(client, setting, problem, max_tokens, seed), problems))
    seconds, cpu_seconds = time.perf_counter() - started, server_cpu_s() - worked
    count = len(problems)
    share = {"in_flight": count, "seconds": seconds / count, "cpu_seconds": cpu_seconds / count}
    return [row | share for row in done]


def server_cpu_s() -> float:
    """Of all child processes of this one so far; of those only the server works while a problem is solved."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(one.user + one.system for one in times))


def group_of(row: rows.Row) -> Group:
    return row["data"], row["prm"], row["max_tokens"]


def title(group: Group) -> str:
    data, prm, max_tokens = group
    return f"{data}, {prm}, {max_tokens} tokens"


def summary(done: Sequence[rows.Row], seed: int) -> tuple[str, dict[Group, list[rows.Row]]]:
    """Of each group the table of `kv_footprint` and that of what the searches cost and repeat; summaries to plot."""
    parts, lines, groups = [], {}, defaultdict(list)
    for row in done:
        groups[group_of(row)].append(row)
    for group, rows_of_group in sorted(groups.items()):
        own = [row for cases in by_setting(rows_of_group, shared=True).values() for row in cases.values()]
        first, lines[group] = table(own, seed)
        parts.append(f"## {title(group)}\n\n{first}\n\n{cost_table(own)}")
    return "\n\n".join(parts), lines


def cost_table(done: Sequence[rows.Row]) -> str:
    """KV footprint, redundancy and throughput of each setting of one group, and how often there was an answer."""
    cells = []
    for width, policy in sorted({(row["width"], row["policy"]) for row in done}):
        own = [row for row in done if (row["width"], row["policy"]) == (width, policy)]
        speeds = [_speed(own, unit) for unit in ("seconds", "cpu_seconds")]
        answered = sum(row["answer"] is not None for row in own)
        differ = sum(row["is_right"] != row["is_right_strict"] for row in own)
        means = [_mean(own, name) for name in COST_MEANS]
        cells.append([policy, width, *means, *speeds, f"{answered}/{len(own)}", f"{differ}/{len(own)}"])
    return rows.markdown(COST_HEADER, cells)


def _mean(own: Sequence[rows.Row], name: str) -> str:
    values = [row[name] for row in own if row.get(name) is not None]
    return f"{sum(values) / len(values):.1f}" if values else ""


def _speed(own: Sequence[rows.Row], unit: str) -> str:
    """Tokens generated in a second; nothing of rows whose time is shared with other settings."""
    if not all("cpu_seconds" in row for row in own):
        return ""
    return f"{sum(row['completion_tokens'] for row in own) / sum(row[unit] for row in own):.1f}"


def plot(lines: dict[Group, list[rows.Row]], path: Path) -> None:
    """KV held by each search, mean over levels and peak, a panel for each group and width; labels tell the accuracy."""
    searched = {
        (group, width): [s for s in own if s["width"] == width and "kv_tokens_mean" in s]
        for group, own in lines.items()
        for width in sorted({s["width"] for s in own if "kv_tokens_mean" in s})
    }
    with panels(path, len(searched), height=3.5) as axes:
        for axis, ((group, width), own) in zip(axes, searched.items(), strict=True):
            names = [f"{s['policy']} ({s['accuracy']:.2f} right)" for s in own]
            axis.barh(names, [s["kv_tokens_mean"] for s in own], color=[colour(s["policy"]) for s in own])
            axis.plot([s["kv_tokens_peak"] for s in own], names, "|", color="0.3")
            axis.set(
                title=f"{title(group)}, width {width}", xlabel="KV tokens held: mean over levels, and the peak (|)"
            )
            axis.title.set_fontsize(9)
            axis.tick_params(labelsize=8)


def unsolved(args: argparse.Namespace, out: Path) -> list[tuple[str, Setting, list[Problem]]]:
    """What the file has no row of: data set, setting, and the problems to solve together.

    All settings come before more problems, so that an interrupted run compares equal sets.
    """
    known = {(*group_of(row), row["setting"], row["problem"], row["seed"]) for row in rows.read(out)}
    todo: list[tuple[str, Setting, list[Problem]]] = []
    for data in args.data:
        name, problems = Path(data).name, load(data, limit=args.problems)
        for first in range(0, len(problems), args.in_flight):
            for setting in settings(args.width, args.policies):
                batch = [
                    problem
                    for problem in problems[first : first + args.in_flight]
                    if (name, args.prm_format, args.max_tokens, setting.key, problem.id, args.seed) not in known
                ]
                todo += [(name, setting, batch)] if batch else []
    return todo


def run(args: argparse.Namespace, out: Path) -> None:
    """Append a graded row for everything that has none."""
    todo = unsolved(args, out)
    if not todo:
        return
    judge = MathProcess()  # ends with this process
    with running_server(flags(args.prm_format)) as url:
        client = client_of(url, timeout_s=3600)
        solve(client, settings(2, ["ets"])[-1], todo[0][2][0], WARM_UP_TOKENS, args.seed)  # kernels compile
        for name, setting, batch in tqdm(todo, unit="batch"):
            done = solve_together(client, setting, batch, args.max_tokens, args.seed)
            for row, problem in zip(done, batch, strict=True):
                graded = asdict(grade(judge, row["answer"], problem.answer))
                rows.append(out, {"data": name, "prm": args.prm_format, **row, **graded})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="gsm8k, math500, or JSONL files (see sglang_ets/tools/datasets.py)")
    parser.add_argument("--prm-format", choices=["confidence", "judge"], default="confidence")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--problems", type=int, default=10, help="of each data set")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=4, help="problems at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", action="store_true", help="run nothing, write tables and plot of the rows anew")
    rows.add_arguments(parser, "1 problem at width 4, two policies")
    args = parser.parse_args()
    if not args.tables and not args.data:
        parser.error("--data must name at least one data set, got none; only --tables goes without")
    if args.smoke:
        args.width, args.problems, args.policies, args.max_tokens = 4, 1, ["rebase", "ets"], 60
    out = rows.out_of(args, "real_model")
    if not args.tables:
        run(args, out)
    text, lines = summary([row for row in rows.read(out) if row["seed"] == args.seed], args.seed)
    plot(lines, out.with_suffix(".png"))
    rows.publish(out, text)


if __name__ == "__main__":
    main()
