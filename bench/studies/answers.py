"""What the trajectories of finished searches hold: is a right answer among them, how many different ones, does the PRM know it.

    python -m bench.studies.answers trees.jsonl

The trees are those that `sglang-ets run` and `bench.real_model --trees` save. A policy that prunes what would have been right
shows it here: the share of problems with a right answer among the trajectories falls, whatever chooses between them. One data
set, width and policy is a row of `--out`. The AUC is that of the last step's score among the trajectories of one problem, the
mean over problems that have right and wrong ones; a PRM that knows nothing has 0.5.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import rows
from bench.studies.stopping import Key, config_of, key_of
from bench.testbed.likelihood import area_under_curve
from bench.trees import path_to
from sglang_ets.core.patterns import extract_answer
from sglang_ets.math_process import MathProcess
from sglang_ets.tools.evaluate import Grader
from sglang_ets.tools.run import rows_in

HEADER = ["data", "width", "policy", "problems", "chosen right", "any right", "majority right", "trajectories right",
          "different answers", "AUC within a problem"]  # fmt: skip


def of_search(row: Mapping[str, Any], grader: Grader) -> dict[str, Any]:
    """Figures of one search: shares and counts over its complete trajectories."""
    nodes, pattern = row["search_result"]["tree"]["nodes"], config_of(row).answer_pattern
    by_id = {node["id"]: node for node in nodes}
    ends = [node for node in nodes if node["state"] == "complete"]
    texts = ["".join(step["text"] for step in path_to(end, by_id)) for end in ends]
    answers = [extract_answer(text, pattern) for text in texts]
    is_right = [grader.of(answer, row["expected"]).is_right for answer in answers]
    votes = Counter(answer for answer in answers if answer is not None)
    first = votes.most_common(1)[0][0] if votes else None
    scored = [(end["score"], right) for end, right in zip(ends, is_right, strict=True) if end["score"] is not None]
    made: dict[str, Any] = {
        "chosen_right": int(row["is_right"]),
        "any_right": int(any(is_right)),
        "majority_right": int(grader.of(first, row["expected"]).is_right),
        "share_right": sum(is_right) / len(ends) if ends else 0.0,
        "different": len(votes),
    }
    if 0 < sum(right for _, right in scored) < len(scored):
        made["auc"] = area_under_curve([score for score, _ in scored], [right for _, right in scored])
    return made


def figures(made: Sequence[Mapping[str, Any]], grader: Grader) -> dict[Key, dict[str, Any]]:
    """Sums and means over the problems of each width and policy; `auc_problems` is how many the AUC is a mean over."""
    found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for row in made:
        found[key_of(row)].append(of_search(row, grader))
    return {key: _together(searches) for key, searches in found.items()}


def _together(searches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    aucs = [one["auc"] for one in searches if "auc" in one]
    counts = {name: sum(one[name] for one in searches) for name in ("chosen_right", "any_right", "majority_right")}
    means = {name: fmean(one[name] for one in searches) for name in ("share_right", "different")}
    return {
        "problems": len(searches),
        **counts,
        **means,
        "auc": fmean(aucs) if aucs else None,
        "auc_problems": len(aucs),
    }


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """A line for each data set, width and policy; of two rows the later."""
    latest = {(row["data"], row["width"], row["policy"]): row for row in done}
    cells = [
        [
            *key, row["problems"], row["chosen_right"], row["any_right"], row["majority_right"],
            f"{row['share_right']:.1%}", f"{row['different']:.1f}",
            "" if row["auc"] is None else f"{row['auc']:.2f} ({row['auc_problems']} problems)",
        ]
        for key, row in latest.items()
    ]  # fmt: skip
    return rows.markdown(HEADER, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of `sglang-ets run`, with `early_stop` off")
    parser.add_argument("--out", type=Path, help="rows, JSONL; default: the file of this bench under bench/results/")
    parser.set_defaults(smoke=False)  # it needs files that another command has made
    args = parser.parse_args()
    out = rows.out_of(args, "answers")
    grader = Grader(MathProcess())
    for (data, width, policy), own in figures([row for file in args.files for row in rows_in(file)], grader).items():
        rows.append(out, {"data": data, "width": width, "policy": policy, **own})
    grader.process.stop()
    rows.publish(out, table(list(rows.read(out))))


if __name__ == "__main__":
    main()
