"""What the trajectories of finished searches hold: is a right answer among them, how many different ones, does the PRM know it.

    python -m bench.studies.answers trees.jsonl

The trees are those that `sglang-ets run` and `bench.real_model --trees` save. A policy that prunes what would have been right
shows it here: the share of problems with a right answer among the trajectories falls, whatever chooses between them. One data
set, width and policy is a row of `--out`. The AUC is that of the last step's score among the trajectories of one problem, the
mean over problems that have right and wrong ones; a PRM that knows nothing has 0.5.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench import rows
from bench.studies import saved
from bench.studies.saved import Key, key_of
from bench.studies.stopping import config_of
from bench.testbed.likelihood import area_under_curve
from bench.trees import trajectory_text
from sglang_ets.core.patterns import extract_answer
from sglang_ets.tools.evaluate import Grader
from sglang_ets.tools.grading import majority

HEADER = ["data", "width", "policy", "problems", "chosen right", "any right", "majority right", "trajectories right",
          "different answers", "AUC within a problem"]  # fmt: skip


def of_search(row: Mapping[str, Any], grader: Grader) -> dict[str, Any]:
    """Figures of one search: shares and counts over its complete trajectories."""
    nodes, pattern = row["search_result"]["tree"]["nodes"], config_of(row).answer_pattern
    by_id = {node["id"]: node for node in nodes}
    ends = [node for node in nodes if node["state"] == "complete"]
    answers = [extract_answer(trajectory_text(end, by_id), pattern) for end in ends]
    is_right = [grader.of(answer, row["expected"]).is_right for answer in answers]
    scored = [(end["score"], right) for end, right in zip(ends, is_right, strict=True) if end["score"] is not None]
    made: dict[str, Any] = {
        "chosen_right": int(row["is_right"]),
        "any_right": int(any(is_right)),
        "majority_right": int(grader.of(majority(answers), row["expected"]).is_right),
        "share_right": sum(is_right) / len(ends) if ends else 0.0,
        "different": len({answer for answer in answers if answer is not None}),
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


if __name__ == "__main__":
    saved.main("answers", __doc__, saved.graded(figures), table)
