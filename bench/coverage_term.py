"""Does coverage pay? ETS against ETS-KV under a strong and a weak PRM, on validation problems of the embedded task.

    python -m bench.coverage_term --smoke
    python -m bench.coverage_term --problems 80

ETS-KV is ETS without its coverage term: it trusts the PRM alone. The strong PRM is the shipped one. The weak one is the policy
model itself, judging the probability of its own results: it is sure of its own mistakes. Both see the same problems, and each
policy is run at several cost weights, so that curves of accuracy against KV are compared and not single settings. The coverage
term of `d` is the published one, the same for every cluster, on clusters of embeddings as they are; `reward` is the server's
default.

One problem under one setting is a row; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openai
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import rows
from bench.figures import curves, panels
from bench.footprint_tables import interval
from bench.kv_footprint import Setting, solve
from bench.server import running_server
from bench.testbed.task import distinct_problems

MODELS = Path(__file__).resolve().parents[1] / "sglang_ets" / "models"
BASELINE = "rebase"
IN_FLIGHT = 4
PUBLISHED = {"coverage": "uniform", "cluster_distance": 0.05, "center_embeddings": False}


@dataclass(frozen=True)
class Grid:
    """Settings that are compared. A diversity weight of 0 is ETS-KV."""

    width: int
    kv_weights: Sequence[float]
    diversity_weights: Sequence[float]

    def settings(self) -> list[Setting]:
        made = [Setting(name, self.width, {"algorithm": name}) for name in (BASELINE, "best_of_n", "dvts")]
        for kv_weight in self.kv_weights:
            for weight in self.diversity_weights:
                search = {"algorithm": "ets", "kv_cost_weight": kv_weight, "diversity_weight": weight, **PUBLISHED}
                made.append(Setting(f"ets b={kv_weight:g} d={weight:g}", self.width, search))
            search = {"algorithm": "ets", "coverage": "reward", "kv_cost_weight": kv_weight}
            made.append(Setting(f"ets reward b={kv_weight:g}", self.width, search))
        return made


def weak_prm(folder: Path) -> Path:
    """The policy model in the format of the shipped PRM."""
    for file in (MODELS / "policy").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "prm_config.json").write_bytes((MODELS / "prm" / "prm_config.json").read_bytes())
    return folder


def run(prm: str, path: Path, grid: Grid, problems: Sequence[dict[str, Any]], out: Path, seed: int) -> None:
    """All settings on all problems, problem by problem."""
    known = {(row["prm"], row["setting"], row["problem"], row["seed"]) for row in rows.read(out)}
    todo = [
        (setting, problem)
        for problem in problems
        for setting in grid.settings()
        if (prm, setting.key, problem["prompt"], seed) not in known
    ]
    if not todo:
        return
    with (
        running_server(["--search", "ets", "--prm-model-path", str(path)]) as url,
        ThreadPoolExecutor(IN_FLIGHT) as pool,
    ):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
        answered = pool.map(lambda job: solve(client, *job, seed), todo)
        for row in tqdm(answered, total=len(todo), unit="run", desc=prm):
            rows.append(out, {"prm": prm, **row})


def summaries(done: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """One line per PRM and setting, over the problems that every setting of that PRM has solved."""
    made = []
    for prm in sorted({row["prm"] for row in done}):
        cases: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in done:
            if row["prm"] == prm:
                cases[row["policy"]][row["problem"]] = row
        shared = sorted(set.intersection(*(set(own) for own in cases.values())))
        base = [cases[BASELINE][problem] for problem in shared]
        for policy, own in cases.items():
            mine = [own[problem] for problem in shared]
            made.append({"prm": prm, "policy": policy, "problems": len(shared), **_compared(mine, base, seed)})
    return made


def _compared(mine: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    right, reference = ([bool(row["is_right"]) for row in side] for side in (mine, base))
    held = [sum(row["kv_tokens_mean"] for row in side) for side in (base, mine)]
    low, high = interval(right, reference, seed)
    found = [row["clusters"] for row in mine if row["clusters"] is not None]
    return {
        "accuracy": sum(right) / len(right),
        "difference": (sum(right) - sum(reference)) / len(right),
        "low": low,
        "high": high,
        "kv_tokens_mean": held[1] / len(mine),
        "kv_reduction": held[0] / held[1],
        "distinct_meanings": sum(row["distinct_meanings"] for row in mine) / len(mine),
        "clusters": sum(found) / len(found) if found else None,
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header = [
        "PRM",
        "policy",
        "problems",
        "accuracy",
        "vs REBASE (95 %)",
        "KV mean",
        "KV reduction",
        "distinct meanings",
    ]
    cells = [
        [
            s["prm"], s["policy"], s["problems"], f"{s['accuracy']:.3f}",
            f"{s['difference']:+.3f} [{s['low']:+.3f}, {s['high']:+.3f}]" if s["policy"] != BASELINE else "",
            s["kv_tokens_mean"], f"{s['kv_reduction']:.2f}", s["distinct_meanings"],
        ]
        for s in lines
    ]  # fmt: skip
    return rows.markdown(header, cells)


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against KV: a panel for each PRM, a curve over cost weights for each diversity weight."""
    prms = sorted({s["prm"] for s in lines})
    with panels(path, len(prms), width=5.5, height=4.2, sharex=True) as axes:
        for axis, prm in zip(axes, prms, strict=True):
            points: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for s in (s for s in lines if s["prm"] == prm):
                name = s["policy"].split(" d=")[-1] if " d=" in s["policy"] else s["policy"].split(" b=")[0]
                points[name].append((s["kv_tokens_mean"], s["accuracy"]))
            curves(axis, points, f"{prm} PRM")
            axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--problems", type=int, default=80)
    parser.add_argument("--kv-weights", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--diversity-weights", type=float, nargs="+", default=[0.0, 0.5, 1.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="2 problems at width 4, one setting, into a file of its own"
    )
    parser.add_argument("--out", type=Path, help="rows, JSONL; default bench/results/coverage.jsonl")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.problems, args.kv_weights, args.diversity_weights = 4, 2, [1.0], [0.0, 1.5]
    out = args.out or rows.RESULTS / ("coverage_smoke.jsonl" if args.smoke else "coverage.jsonl")
    grid = Grid(args.width, args.kv_weights, args.diversity_weights)
    drawn = distinct_problems("validation", args.problems, args.seed)
    problems = [{"prompt": problem.prompt, "answer": problem.answer} for problem in drawn]
    with TemporaryDirectory() as folder:
        for prm, path in (("weak", weak_prm(Path(folder))), ("strong", MODELS / "prm")):
            run(prm, path, grid, problems, out, args.seed)
    lines = summaries([row for row in rows.read(out) if row["seed"] == args.seed], args.seed)
    text = table(lines)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    plot(lines, out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
