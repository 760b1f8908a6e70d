"""What had grown below the leaves that a policy keeps? One level at a time, on saved trees of any model.

    python -m bench.real_model ... --policies rebase --validation --embeddings --trees trees.jsonl
    python -m bench.studies.survivors trees.jsonl

Nobody knows of a real model's step whether it is right, but a REBASE tree shows what came of each leaf that went on: the
answers of the trajectories below it. A leaf counts as right if one of them is. Each setting selects from the very same levels,
less the leaves that REBASE itself gave up, of which nothing is known. A level counts if it has right leaves and others, and
`lost` beside `lost by chance` (as many leaves, drawn blindly) says whether a setting knows what it throws away. Settings are
chosen on problems that are left for validation. A setting is a row of `--out`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from bench import rows
from bench.studies import saved
from bench.studies.saved import Key, key_of
from bench.studies.selection_quality import kept_cost
from bench.studies.stopping import config_of
from bench.trees import Node, path_to, trajectory_text
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.patterns import extract_answer
from sglang_ets.core.selection import Level
from sglang_ets.testing import levels_of
from sglang_ets.tools.evaluate import Grader

GROWN_BY = "rebase"
HEADER = ["data", "width", "setting", "levels", "leaves kept", "KV kept", "answers kept", "width on right leaves", "lost",
          "lost by chance"]  # fmt: skip
FIGURES = ("kept", "kv_kept", "answers_kept", "right_width", "lost", "lost_by_chance")


@dataclass(frozen=True)
class Known:
    """A level whose leaves all went on, and what came of them."""

    level: Level
    answers: tuple[frozenset[str | None], ...]  # L sets, of the trajectories below each leaf
    is_right: NDArray[np.bool_]  # bool[L], one of them is right


def known_levels(row: Mapping[str, Any], grader: Grader) -> Iterator[Known]:
    """The levels of one saved search that have right leaves and others."""
    nodes = [node for node in row["search_result"]["tree"]["nodes"] if node["state"] != "pruned"]
    below = answers_below(nodes, config_of(row).answer_pattern)
    for level, leaf_ids in levels_of(nodes):
        answers = tuple(frozenset(below[leaf_id]) for leaf_id in leaf_ids)
        right = np.array([any(grader.of(one, row["expected"]).is_right for one in own) for own in answers])
        if right.any() and not right.all():
            yield Known(level, answers, right)


def answers_below(nodes: Sequence[Node], pattern: str) -> Mapping[int, set[str | None]]:
    """Node id -> the answers of the complete trajectories that end in it or below it."""
    by_id = {node["id"]: node for node in nodes}
    below: dict[int, set[str | None]] = defaultdict(set)
    for end in nodes:
        if end["state"] == "complete":
            answer = extract_answer(trajectory_text(end, by_id), pattern)
            for step in path_to(end, by_id):
                below[step["id"]].add(answer)
    return below


def settings(width: int) -> Iterator[tuple[str, SearchConfig]]:
    """REBASE over temperatures, ETS over weights and cuts, and as published."""
    for temperature in (0.2, 0.1, 0.05, 0.02):
        yield f"rebase T={temperature:g}", SearchConfig("rebase", width, rebase_temperature=temperature)
    for weight in (0.5, 1.0, 2.0, 4.0):
        yield f"ets_kv b={weight:g}", SearchConfig("ets_kv", width, kv_cost_weight=weight)
        for cut in (0.05, 0.15, 0.3):
            yield (
                f"ets b={weight:g} cut={cut:g}",
                SearchConfig(width=width, kv_cost_weight=weight, cluster_distance=cut),
            )
    yield "ets published", SearchConfig.from_request(width, {"preset": "paper"}, {}, n=None, max_tokens=None, seed=None)


def quality(known: Sequence[Known], config: SearchConfig) -> dict[str, float]:
    """Means over levels."""
    figures: dict[str, list[float]] = {name: [] for name in FIGURES}
    for item in known:
        allocation = config.policy.select(item.level, config).allocation
        kept = allocation > 0
        survived = frozenset[str | None]().union(*(item.answers[place] for place in np.flatnonzero(kept)))
        assert item.level.kv is not None
        figures["kept"].append(kept.mean())
        figures["kv_kept"].append(kept_cost(item.level.kv, kept))
        figures["answers_kept"].append(len(survived) / len(frozenset[str | None]().union(*item.answers)))
        figures["right_width"].append(allocation[item.is_right].sum() / allocation.sum())
        figures["lost"].append(float(not item.is_right[kept].any()))
        figures["lost_by_chance"].append(hypergeom.pmf(0, kept.size, item.is_right.sum(), kept.sum()))
    return {name: fmean(map(float, values)) for name, values in figures.items()}


def figures_of(made: Sequence[Mapping[str, Any]], grader: Grader) -> dict[Key, dict[str, Any]]:
    """Of each data set and width under each setting; trees of other policies are passed over."""
    known: dict[tuple[str, int], list[Known]] = defaultdict(list)
    for row in made:
        data, width, policy = key_of(row)
        if policy == GROWN_BY:
            known[data, width] += known_levels(row, grader)
    return {
        (data, width, name): {"levels": len(levels), **quality(levels, config)}
        for (data, width), levels in known.items()
        for name, config in settings(width)
    }


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """A line for each data set, width and setting; of two rows the later."""
    latest = {(row["data"], row["width"], row["policy"]): row for row in done}
    cells = [[*key, row["levels"], *(f"{row[name]:.3f}" for name in FIGURES)] for key, row in latest.items()]
    return rows.markdown(HEADER, cells)


def _figures(made: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    grader = Grader()
    try:
        return figures_of(made, grader)
    finally:
        grader.process.stop()


if __name__ == "__main__":
    saved.main("survivors", __doc__, _figures, table)
