"""A real language model on GSM8K and MATH-500: what each policy gets right, holds, generates and takes.

    python -m bench.real_model --model-path Qwen/Qwen2.5-Coder-0.5B-Instruct --data gsm8k --smoke
    python -m bench.real_model --model-path FOLDER --prm-format judge --data gsm8k --width 4 --problems 100
    python -m bench.real_model --model-path FOLDER --prm-model-path PRM --data gsm8k math500
    python -m bench.real_model --tables                                    # from the rows that are there

Chat requests go through the model's own template and tokenizer, searches through the loop of `sglang-ets run`. `greedy` is a
plain request, `self_consistency` the majority of the very trajectories that `best_of_n` made, so it costs what that costs, and
`ets published` is `preset: paper` at the temperature of all others. Searches do not end early, so that all of their
trajectories count, and all choose by the same rule. Answers are graded by math-verify, and by a second, stricter grader.

One problem under one setting is a row; a run that was interrupted goes on where it stopped. `--in-flight` problems are solved
at once, each setting for itself, and a row has an equal share of the seconds that they took, of the clock and of the server's
CPU time; the latter means something on a busy machine too. With `--together` all searches of these problems are in flight at
once: the weights are read once for all of them, and a row has only its own wait under that load, which no table shows. Tables
and plot never mix models, data sets, PRMs or limits. `--validation` takes the problems that are left for choosing settings on,
and no others. `--trees` saves each search with its whole tree too, as `sglang-ets run` does, for `sglang-ets evaluate` and the
studies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from bench import rows
from bench.client_search.processes import Running, awake, running
from bench.embedded import TUNED_ETS, client_of
from bench.figures import accuracy_against_kv
from bench.redundancy import redundancy
from bench.searches import FROM_SEARCH, Setting
from bench.tables import by_setting, equal_cost_tables, frontier, table
from bench.trees import num_distinct_prefixes, trajectory_text
from sglang_ets.core.patterns import extract_answer
from sglang_ets.math_process import MathProcess
from sglang_ets.tools import run as runs
from sglang_ets.tools import tune
from sglang_ets.tools.datasets import Problem, load
from sglang_ets.tools.grading import grade, majority

WARM_UP_TOKENS = 8
POOL_TOKENS = 60_000
TIMEOUT_S = 3600
PATTERN = "boxed"
COMMON = {"answer": "weighted_majority", "answer_pattern": PATTERN, "early_stop": "off"}
NAMED: dict[str, dict[str, Any]] = {
    "best_of_n": {"algorithm": "best_of_n"},
    "dvts": {"algorithm": "dvts"},
    "dora": {"algorithm": "dora"},
    "particles": {"algorithm": "particles"},
    "rebase": {"algorithm": "rebase"},
    "ets_kv": {"algorithm": "ets_kv"},
    "ets": {"algorithm": "ets"},
    # The default until width 16 was measured: chosen on the embedded task.
    "ets b=4": TUNED_ETS,
    # What `sglang-ets tune` suggested for a head learned from 516 rollouts, while it went by levels: too hard.
    "ets b=2": {"algorithm": "ets", "coverage": "uniform", "kv_cost_weight": 2.0, "cluster_distance": 0.3},
    "ets published": {"algorithm": "ets", "preset": "paper"},
}
POLICIES = {**dict(tune.candidates()), **NAMED}  # what `sglang-ets tune` suggests has the same name here
FREE, SAMPLED = "best_of_n", "self_consistency"  # the second is made of the trajectories of the first
VALIDATION = ", validation"
COST_HEADER = ["policy", "width", "KV mean", "KV if unshared", "leaves", "distinct texts", "clusters", "tokens a step",
               "tokens generated", "tokens computed", "distinct prefixes", "CPU s/problem", "answered",
               "graders disagree"]  # fmt: skip
COST_MEANS = (
    "kv_tokens_mean",
    "kv_referenced_mean",
    "leaves",
    "distinct_texts",
    "clusters",
    "step_tokens",
    "completion_tokens",
    "tokens_computed",
    "distinct_prefixes",
    "cpu_seconds",
)

Group = tuple[str, str, str, int, float]  # model, data set, PRM, max_tokens, temperature: what no table may mix


@dataclass(frozen=True)
class Case:
    """What all requests of one run have in common."""

    model: str
    prm: str
    max_tokens: int
    temperature: float
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Case:
        """Names instead of paths: a folder's place on one machine says nothing elsewhere."""
        prm = f"{Path(args.prm_model_path).name}, {args.prm_format}" if args.prm_model_path else args.prm_format
        return cls(Path(args.model_path).name, prm, args.max_tokens, args.temperature, args.seed)

    def group(self, data: str) -> Group:
        return self.model, data, self.prm, self.max_tokens, self.temperature


def settings(width: int, policies: Sequence[str], *, embeddings: bool = False) -> list[Setting]:
    """A greedy answer, then the searches; all beside those of this width."""
    returned = {"return_embeddings": True} if embeddings else {}
    searches = [Setting(name, width, {**POLICIES[name], **COMMON, **returned}) for name in policies]
    return [Setting("greedy", width, {}), *searches]


def flags(args: argparse.Namespace) -> list[str]:
    """Of the server; without a PRM of its own it judges with the policy model's weights.

    What `generation_config.json` would add to a request is left aside: a model's copies may differ in it.
    """
    prm = ["--prm-model-path", args.prm_model_path] if args.prm_model_path else []
    return ["--search", "ets", "--model-path", args.model_path, *prm, "--prm-format", args.prm_format, "--dtype", args.dtype,
            "--sampling-defaults", "openai",
            "--max-total-tokens", str(POOL_TOKENS), "--prm-max-total-tokens", str(POOL_TOKENS)]  # fmt: skip


def searched(
    client: openai.OpenAI, chosen: Sequence[Setting], case: Case, problems: Sequence[Problem], judge: MathProcess
) -> dict[tuple[str, str], rows.Row]:
    """The row of `sglang-ets run` for each setting and problem, all of them in flight at once."""
    texts = {setting.key: json.dumps(setting.search) for setting in chosen}
    jobs = [
        (runs.Asked("", setting.width, texts[setting.key], case.temperature, case.seed, case.max_tokens), problem)
        for setting in chosen
        for problem in problems
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.jsonl"
        for _ in runs.run(client, jobs, out, len(jobs), judge):
            pass
        made = {(row["search"], row["problem"]): row for row in runs.rows_in(out)}
    return {(key, problem.id): made[text, problem.id] for key, text in texts.items() for problem in problems}


def figures_of(row: rows.Row) -> rows.Row:
    """What a bench keeps of a row of `sglang-ets run`: no texts and no tree."""
    figures = row["search_result"]
    nodes = figures["tree"]["nodes"]
    seen = redundancy(nodes)
    return {
        **{name: figures[name] for name in (*FROM_SEARCH, "tokens_computed")},
        **{name: getattr(seen, name) for name in ("leaves", "distinct_texts", "clusters")},
        **{name: row[name] for name in ("answer", "is_right", "is_right_strict", "timed_out")},
        "distinct_prefixes": num_distinct_prefixes(nodes),
        "fallbacks": figures["solver"]["fallbacks"],
        "seconds": row["seconds"],
        "step_tokens": sum(len(node["token_ids"]) for node in nodes) / len(nodes),
        "completion_tokens": row["usage"]["completion_tokens"],
    }


def voted(row: rows.Row, judge: MathProcess) -> rows.Row:
    """The majority of a search's trajectories, without a PRM."""
    nodes = row["search_result"]["tree"]["nodes"]
    by_id = {node["id"]: node for node in nodes}
    ends = [node for node in nodes if node["state"] == "complete"]
    texts = [trajectory_text(end, by_id) for end in ends]
    answer = majority([extract_answer(text, PATTERN) for text in texts])
    cost = {"completion_tokens": row["usage"]["completion_tokens"], "seconds": row["seconds"]}
    return {"answer": answer, **cost, **asdict(grade(judge, answer, row["expected"]))}


def greedy(client: openai.OpenAI, case: Case, problem: Problem) -> rows.Row:
    """A plain request, not graded yet."""
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": problem.prompt}],
        temperature=0.0,
        max_tokens=case.max_tokens,
    )
    text = extract_answer(answer.choices[0].message.content or "", PATTERN)
    assert answer.usage is not None
    return {"answer": text, "completion_tokens": answer.usage.completion_tokens}


def solve_together(
    server: Running,
    chosen: Sequence[Setting],
    case: Case,
    problems: Sequence[Problem],
    judge: MathProcess,
    keep: Callable[[Iterable[rows.Row]], None] | None = None,
) -> list[rows.Row]:
    """All problems under all of these settings in flight at once, either searches or one that is none.

    `keep` gets the row of `sglang-ets run` of every search, with its tree. Each row of a single setting has an equal share of
    the time that its problems took; with several, its own wait.
    """
    client, count = client_of(server.url, TIMEOUT_S), len(problems)
    started, worked = time.perf_counter(), server.cpu_s()
    if chosen[0].search:
        made = searched(client, chosen, case, problems, judge)
        if keep is not None:
            keep(made.values())
    else:
        with ThreadPoolExecutor(count) as pool:
            plain = list(pool.map(lambda problem: greedy(client, case, problem), problems))
    share = {"seconds": time.perf_counter() - started, "cpu_seconds": server.cpu_s() - worked}
    if chosen[0].search:
        done = [row for setting in chosen for one in problems for row in rows_of(setting, one, made, judge)]
    else:
        grades = [asdict(grade(judge, row["answer"], one.answer)) for row, one in zip(plain, problems, strict=True)]
        named = [_named(chosen[0], one) for one in problems]
        done = [name | row | graded for name, row, graded in zip(named, plain, grades, strict=True)]
    own = {name: value / count for name, value in share.items()} if len(chosen) == 1 else {}
    return [row | own | {"in_flight": count * len(chosen)} for row in done]


def rows_of(
    setting: Setting, problem: Problem, made: dict[tuple[str, str], rows.Row], judge: MathProcess
) -> list[rows.Row]:
    """Of one search, and of the vote among its trajectories if nothing chose among them on the way."""
    row = made[setting.key, problem.id]
    votes = [_named(Setting(SAMPLED, setting.width, {}), problem) | voted(row, judge)] if setting.name == FREE else []
    return [_named(setting, problem) | figures_of(row), *votes]


def _named(setting: Setting, problem: Problem) -> rows.Row:
    return {"setting": setting.key, "policy": setting.name, "width": setting.width, "problem": problem.id}


def group_of(row: rows.Row) -> Group:
    return row["model"], row["data"], row["prm"], row["max_tokens"], row["temperature"]


def title(group: Group) -> str:
    model, data, prm, max_tokens, temperature = group
    return f"{model}, {data}, {prm}, {max_tokens} tokens, temperature {temperature:g}"


def summary(done: Sequence[rows.Row], seed: int) -> tuple[str, dict[str, tuple[str, list[rows.Row]]]]:
    """Of each group accuracy and KV, costs, the frontier of each width, and accuracy at equal cost; by title, to plot."""
    parts, by_title, groups = [], {}, defaultdict(list)
    for row in done:
        groups[group_of(row)].append(row)
    for group, rows_of_group in sorted(groups.items()):
        solved = by_setting([_without_waits(row) for row in rows_of_group], shared=True)
        own = [row for cases in solved.values() for row in cases.values()]
        first, summaries = table(own, seed)
        widths = sorted({s["width"] for s in summaries})
        lines = [
            f"Not dominated at width {width}, from the least KV: "
            + ", ".join(s["policy"] for s in frontier(s for s in summaries if s["width"] == width))
            for width in widths
        ]
        at_equal_cost = [equal_cost_tables(summaries)] if len(widths) > 1 else []
        parts.append("\n\n".join([f"## {title(group)}", first, cost_table(own), *lines, *at_equal_cost]))
        by_title[title(group)] = first, summaries
    return "\n\n".join(parts), by_title


def _without_waits(row: rows.Row) -> rows.Row:
    """What one search waited beside those of other settings is no cost of its own, and no table shows it."""
    return row if "cpu_seconds" in row else {name: value for name, value in row.items() if name != "seconds"}


def cost_table(done: Sequence[rows.Row]) -> str:
    """KV footprint, redundancy, tokens and CPU time of each setting of one group, and how often there was an answer."""
    cells = []
    for width, policy in sorted({(row["width"], row["policy"]) for row in done}):
        own = [row for row in done if (row["width"], row["policy"]) == (width, policy)]
        answered = sum(row["answer"] is not None for row in own)
        differ = sum(row["is_right"] != row["is_right_strict"] for row in own)
        means = [_mean(own, name) for name in COST_MEANS]
        cells.append([policy, width, *means, f"{answered}/{len(own)}", f"{differ}/{len(own)}"])
    return rows.markdown(COST_HEADER, cells)


def _mean(own: Sequence[rows.Row], name: str) -> str:
    values = [row[name] for row in own if row.get(name) is not None]
    return f"{sum(values) / len(values):.1f}" if values else ""


def known_in(out: Path) -> set[tuple[Any, ...]]:
    """What the file has a row of."""
    return {(*group_of(row), row["setting"], row["problem"], row["seed"]) for row in rows.read(out)}


def unsolved(args: argparse.Namespace, out: Path) -> list[tuple[str, list[Setting], list[Problem]]]:
    """What the file has no row of: data set, settings, and the problems to solve together.

    All settings come before more problems, so that an interrupted run compares equal sets.
    """
    case, known = Case.of(args), known_in(out)
    greedy_one, *searches = settings(args.width, args.policies, embeddings=args.embeddings)
    steps = [[greedy_one], searches] if args.together else [[setting] for setting in (greedy_one, *searches)]
    todo: list[tuple[str, list[Setting], list[Problem]]] = []
    for data in args.data:
        name = Path(data).name + VALIDATION * args.validation
        problems = load(data, args.skip + args.problems, "validation" if args.validation else "report")[args.skip :]
        for first in range(0, len(problems), args.in_flight):
            for chosen in steps:
                batch = [
                    problem
                    for problem in problems[first : first + args.in_flight]
                    if any((*case.group(name), one.key, problem.id, args.seed) not in known for one in chosen)
                ]
                todo += [(name, chosen, batch)] if batch else []
    return todo


def run(args: argparse.Namespace, out: Path) -> None:
    """Append a graded row for everything that has none."""
    todo, known = unsolved(args, out), known_in(out)
    if not todo:
        return
    case, judge = Case.of(args), MathProcess()
    with running([flags(args)]) as (server,), awake([server]):
        short = Case(case.model, case.prm, WARM_UP_TOKENS, case.temperature, case.seed)
        solve_together(server, settings(2, ["ets"])[-1:], short, todo[0][2][:1], judge)  # kernels compile
        for name, chosen, batch in tqdm(todo, unit="batch"):
            keep = partial(save_trees, args.trees, name) if args.trees else None
            for row in solve_together(server, chosen, case, batch, judge, keep):
                if (*case.group(name), row["setting"], row["problem"], args.seed) not in known:
                    rows.append(out, {"data": name, **asdict(case), **row})
    judge.stop()


def save_trees(trees: Path, data: str, searches: Iterable[rows.Row]) -> None:
    with trees.open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row | {'data': data})}\n" for row in searches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="a folder or a name on the Hub")
    parser.add_argument("--prm-model-path", help="default: the policy model's own weights")
    parser.add_argument("--prm-format", default="judge", help="see docs/prms.md (default judge)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data", nargs="+", help="gsm8k, math500, or JSONL files (see sglang_ets/tools/datasets.py)")
    parser.add_argument("--validation", action="store_true", help="the problems left for choosing settings on")
    known = f"of these and of the settings of `sglang-ets tune`: {', '.join(NAMED)} (default: these)"
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(NAMED), metavar="NAME", help=known)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--problems", type=int, default=100, help="of each data set")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many, as a PRM learned from them")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--in-flight", type=int, default=4, help="problems at once")
    parser.add_argument("--together", action="store_true", help="all searches of these problems at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trees", type=Path, metavar="FILE", help="append every search with its tree")
    parser.add_argument("--embeddings", action="store_true", help="in these trees too, for studies that select again")
    parser.add_argument("--tables", action="store_true", help="run nothing, write tables and plot of the rows anew")
    rows.add_arguments(parser, "1 problem at width 4, two policies")
    args = parser.parse_args()
    if not args.tables and not (args.data and args.model_path):
        parser.error("--model-path and --data must be given; only --tables goes without")
    if args.smoke:
        args.width, args.problems, args.policies, args.max_tokens = 4, 1, ["best_of_n", "ets"], 60
    out = rows.out_of(args, "real_model")
    if not args.tables:
        run(args, out)
    text, by_title = summary([row for row in rows.read(out) if row["seed"] == args.seed], args.seed)
    accuracy_against_kv(by_title, out.with_suffix(".png"))
    rows.publish(out, text)


if __name__ == "__main__":
    main()
