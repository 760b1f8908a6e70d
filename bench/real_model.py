"""A real language model: SmolLM2-135M-Instruct on GSM8K or MATH-500, searched with a PRM that needs no other weights.

    python -m bench.real_model --data GSM8K.jsonl --smoke
    python -m bench.real_model --data GSM8K.jsonl --problems 10 --width 8

Chat requests go through the model's own template and tokenizer. `--prm-format confidence` scores a step by the model's own mean
log-probability of it, `judge` asks the same weights a yes/no question. A model of this size solves next to nothing: what this
shows is KV held, tokens and seconds with a real vocabulary and real steps. Answers are graded by math-verify, and by a
second, stricter grader.

One problem under one setting is a row; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import rows
from bench.datasets import Problem, load
from bench.grading import Grader, majority
from bench.kv_footprint import Setting, plot, table
from bench.redundancy import redundancy
from bench.server import running_server
from bench.smollm2 import checkpoint
from sglang_ets.patterns import extract_answer

POOL_TOKENS = 12_000
STEP = {"step_delimiter": ["\n"], "max_step_tokens": 64}
COSTS = ("kv_tokens_mean", "kv_tokens_peak", "kv_retained_mean", "kv_referenced_mean", "prm_tokens", "levels")
POLICIES = ("best_of_n", "beam", "dvts", "rebase", "ets_kv", "ets")


def settings(width: int, policies: Sequence[str]) -> list[Setting]:
    """Greedy, self-consistency and the searches."""
    plain = [Setting("greedy", 1, {}), Setting("self_consistency", width, {})]
    return plain + [Setting(name, width, {"algorithm": name, **STEP}) for name in policies]


def flags(prm_format: str) -> list[str]:
    """Of a server that judges with the policy model's own weights."""
    return ["--search", "ets", "--model-path", str(checkpoint()), "--prm-format", prm_format, "--dtype", "float32",
            "--max-total-tokens", str(POOL_TOKENS), "--prm-max-total-tokens", str(POOL_TOKENS)]  # fmt: skip


def solve(client: openai.OpenAI, setting: Setting, problem: Problem, max_tokens: int, seed: int) -> dict[str, Any]:
    """One problem under one setting, not graded yet."""
    started = time.perf_counter()
    body: dict[str, Any] = {
        "model": "default", "messages": [{"role": "user", "content": problem.prompt}], "max_tokens": max_tokens, "seed": seed,
    }  # fmt: skip
    cost: dict[str, Any] = {}
    if setting.search:
        search = {**setting.search, "answer_pattern": problem.answer_pattern, "return_tree": True}
        response = client.chat.completions.create(
            **body, temperature=1.0, extra_body={"search_width": setting.width, "search": search}
        )
        found = dict(response.metadata["search"])  # type: ignore[attr-defined]
        nodes = found["tree"]["nodes"]
        seen = redundancy(nodes)
        cost = {name: found[name] for name in COSTS}
        cost |= {"leaves": seen.leaves, "distinct_texts": seen.distinct_texts, "clusters": seen.clusters}
        cost["step_tokens"] = sum(len(node["token_ids"]) for node in nodes) / len(nodes)
        answer = extract_answer(response.choices[0].message.content or "", problem.answer_pattern)
    else:
        response = client.chat.completions.create(**body, n=setting.width, temperature=float(setting.width > 1))
        texts = [choice.message.content or "" for choice in response.choices]
        answer = majority([extract_answer(text, problem.answer_pattern) for text in texts])
    return {
        "setting": setting.key, "policy": setting.name, "width": setting.width, "problem": problem.id, "seed": seed,
        "answer": answer, "completion_tokens": response.usage.completion_tokens if response.usage else 0,
        "seconds": time.perf_counter() - started, **cost,
    }  # fmt: skip


def summary(done: Sequence[dict[str, Any]], seed: int) -> tuple[str, list[dict[str, Any]]]:
    """The table of `kv_footprint`, and one of what the searches repeat."""
    first, lines = table(list(done), seed)
    header = ["policy", "width", "leaves", "distinct texts", "clusters", "tokens a step", "graders disagree"]
    cells = []
    for key in sorted({row["setting"] for row in done}):
        own = [row for row in done if row["setting"] == key]
        differ = sum(row["is_right"] != row["is_right_strict"] for row in own) / len(own)
        means = [_mean(own, name) for name in ("leaves", "distinct_texts", "clusters", "step_tokens")]
        cells.append([own[0]["policy"], own[0]["width"], *means, f"{differ:.2f}"])
    return f"{first}\n\n{rows.markdown(header, cells)}", lines


def _mean(own: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in own if row.get(name) is not None]
    return f"{sum(values) / len(values):.1f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="gsm8k, math500, or a JSONL file (see bench/datasets.py)")
    parser.add_argument("--prm-format", choices=["confidence", "judge"], default="confidence")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--problems", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="1 problem at width 4, two policies, into a file of its own"
    )
    parser.add_argument("--out", type=Path, help="rows, JSONL; default bench/results/real_model.jsonl")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.problems, args.policies, args.max_tokens = 4, 1, ["rebase", "ets"], 60
    out = args.out or rows.RESULTS / ("real_model_smoke.jsonl" if args.smoke else "real_model.jsonl")
    problems = load(args.data, limit=args.problems)
    known = {(row["prm"], row["setting"], row["problem"], row["seed"]) for row in rows.read(out)}
    todo = [
        (setting, problem)
        for problem in problems
        for setting in settings(args.width, args.policies)
        if (args.prm_format, setting.key, problem.id, args.seed) not in known
    ]
    with running_server(flags(args.prm_format)) as url, Grader("math") as grader:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600, max_retries=0)
        for setting, problem in tqdm(todo, unit="run"):
            row = solve(client, setting, problem, args.max_tokens, args.seed)
            grade = grader.grade(row["answer"], problem.answer, also_strict=True)
            graded = {"is_right": grade.is_right, "is_right_strict": bool(grade.strict), "timed_out": grade.timed_out}
            rows.append(out, {"prm": args.prm_format, "data": Path(args.data).name, **row, **graded})
    done = [row for row in rows.read(out) if row["seed"] == args.seed and row["prm"] == args.prm_format]
    text, lines = summary(done, args.seed)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    plot(lines, out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
