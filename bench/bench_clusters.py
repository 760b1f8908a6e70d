"""Which cluster cut fits a PRM: clusters, purity, accuracy and KV for several `cluster_distance`, on the embedded task.

What a step means is known exactly there (see `redundancy`), so the number of clusters and their purity have a ground truth.
"""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from bench import rows
from bench.redundancy import redundancy, tree_of
from bench.server import running_server

PROBLEMS = Path(__file__).resolve().parents[1] / "sglang_ets" / "models" / "problems.jsonl"
ANSWER = re.compile(r"The answer is (-?\d+)")
SEARCH = {"algorithm": "ets", "coverage": "reward", "kv_cost_weight": 1.0, "diversity_weight": 1.5}
FIGURES = ("leaves", "distinct_texts", "distinct_meanings", "clusters", "purity", "kv_tokens_mean", "is_right")


def solve(client: openai.OpenAI, problem: dict[str, Any], width: int, cut: float, seed: int) -> dict[str, float]:
    answer = client.completions.create(
        model="default",
        prompt=problem["prompt"],
        max_tokens=512,
        seed=seed,
        extra_body={
            "search_width": width,
            "search": {**SEARCH, "cluster_distance": cut, "return_tree": True},
        },
    )
    found = ANSWER.findall(answer.choices[0].text)
    figures = vars(redundancy(tree_of(answer)["nodes"]))
    figures["kv_tokens_mean"] = answer.metadata["search"]["kv_tokens_mean"]  # type: ignore[attr-defined]
    return {**figures, "is_right": float(bool(found) and found[-1] == str(problem["answer"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.6])
    parser.add_argument("--problems", type=int, default=40, help="taken from the end of the held-out set")
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "two problems at width 8")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.problems, args.cuts = 8, 2, [0.2, 0.3]
    out = rows.out_of(args, "clusters")
    problems = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()][-args.problems :]
    made = []
    with running_server(["--search", "ets"]) as url, ThreadPoolExecutor(4) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
        for cut in tqdm(args.cuts, unit="cut"):
            found = list(pool.map(lambda p, cut=cut: solve(client, p, args.width, cut, args.seed), problems))
            means = {key: sum(row[key] or 0.0 for row in found) / len(found) for key in FIGURES}
            made.append({"cut": cut, "width": args.width, "problems": len(found), "seed": args.seed, **means})
            rows.append(out, made[-1])
    header = ["cut", "width", "problems", *FIGURES]
    text = rows.markdown(header, [[row[key] for key in header] for row in made])
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
