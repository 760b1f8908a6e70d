"""Does coverage pay? ETS against ETS-KV under a strong and a weak PRM, on validation problems of the embedded task.

    python -m bench.coverage_term --smoke
    python -m bench.coverage_term --problems 100 --servers 2

ETS-KV is ETS without its coverage term: it trusts the PRM alone. The strong PRM is the shipped one. The weak one is the policy
model itself, judging the probability of its own results: it is sure of its own mistakes. Both see the same problems, and each
policy is run at several cost weights, so that curves of accuracy against KV are compared and not single settings. The coverage
term of `d` is the published one, the same for every cluster, on clusters of embeddings as they are; `reward` is the server's
default.

One problem under one setting is a row; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import rows
from bench.figures import curves, panels
from bench.footprint_tables import BASELINE, tables_by
from bench.kv_footprint import Setting, add_run_arguments, run_all
from bench.testbed.task import distinct_problems

MODELS = Path(__file__).resolve().parents[1] / "sglang_ets" / "models"
PRMS = ("strong", "weak")
PUBLISHED = {"coverage": "uniform", "cluster_distance": 0.05, "center_embeddings": False}


def grid(width: int, kv_weights: Sequence[float], diversity_weights: Sequence[float]) -> list[Setting]:
    """Settings that are compared. A diversity weight of 0 is ETS-KV."""
    made = [Setting(name, width, {"algorithm": name}) for name in (BASELINE, "best_of_n", "dvts")]
    for kv_weight in kv_weights:
        for weight in diversity_weights:
            search = {"algorithm": "ets", "kv_cost_weight": kv_weight, "diversity_weight": weight, **PUBLISHED}
            made.append(Setting(f"ets b={kv_weight:g} d={weight:g}", width, search))
        search = {"algorithm": "ets", "coverage": "reward", "kv_cost_weight": kv_weight}
        made.append(Setting(f"ets reward b={kv_weight:g}", width, search))
    return made


def weak_prm(folder: Path) -> Path:
    """The policy model in the format of the shipped PRM."""
    for file in (MODELS / "policy").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "prm_config.json").write_bytes((MODELS / "prm" / "prm_config.json").read_bytes())
    return folder


def tables(done: Sequence[dict[str, Any]], seed: int) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Table and summaries of each PRM."""
    return tables_by(done, "prm", PRMS, seed)


def markdown(made: dict[str, tuple[str, list[dict[str, Any]]]]) -> str:
    """All tables, the name of its PRM above each."""
    return "\n\n".join(f"{prm} PRM\n\n{text}" for prm, (text, _) in made.items())


def plot(made: dict[str, tuple[str, list[dict[str, Any]]]], path: Path) -> None:
    """Accuracy against KV: a panel for each PRM, a curve over cost weights for each diversity weight."""
    with panels(path, len(made), width=5.5, height=4.2, sharex=True) as axes:
        for axis, (prm, (_, summaries)) in zip(axes, made.items(), strict=True):
            points: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for s in summaries:
                name = s["policy"].split(" d=")[-1] if " d=" in s["policy"] else s["policy"].split(" b=")[0]
                points[name].append((s["kv_tokens_mean"], s["accuracy"]))
            curves(axis, points, f"{prm} PRM")
            axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prms", nargs="+", choices=PRMS, default=PRMS)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--kv-weights", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--diversity-weights", type=float, nargs="+", default=[0.0, 1.5])
    add_run_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.width, args.problems, args.kv_weights, args.diversity_weights = 4, 2, [1.0], [0.0, 1.5]
    out = rows.out_of(args, "coverage")
    settings = grid(args.width, args.kv_weights, args.diversity_weights)
    drawn = distinct_problems("validation", args.problems, args.seed)
    jobs = [(setting, {"prompt": p.prompt, "answer": p.answer}) for p in drawn for setting in settings]
    with TemporaryDirectory() as folder:
        paths = {"strong": MODELS / "prm", "weak": weak_prm(Path(folder))}
        for prm in args.prms:
            flags = ["--prm-model-path", str(paths[prm])]
            shared = {"servers": args.servers, "in_flight": args.in_flight, "flags": flags}
            run_all(jobs, out, args.seed, extra={"prm": prm}, **shared)
    made = tables(list(rows.read(out)), args.seed)
    text = markdown(made)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    plot(made, out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
