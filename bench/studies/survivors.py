"""What had grown below the leaves that a setting keeps: the table of `sglang-ets tune` as rows.

    python -m bench.real_model ... --policies rebase --validation --embeddings --trees trees.jsonl
    python -m bench.studies.survivors trees.jsonl

A setting is a row of `--out`; what the columns mean stands in `sglang_ets/tools/tune.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from bench import rows
from bench.studies import saved
from bench.studies.saved import Key, key_of
from bench.studies.stopping import config_of
from sglang_ets.tools import tune
from sglang_ets.tools.evaluate import Grader
from sglang_ets.tools.tune import GROWN_BY, KnownLevel, Quality

HEADER = ["data", "width", "setting", "levels", *tune.HEADER[1:]]
FIGURES = tuple(field.name for field in fields(Quality))


def figures_of(made: Sequence[Mapping[str, Any]], grader: Grader) -> dict[Key, dict[str, Any]]:
    """Of each data set and width under each setting; trees of other policies are passed over."""
    known: dict[tuple[str, int], list[KnownLevel]] = defaultdict(list)
    for number, row in enumerate(made):
        data, width, policy = key_of(row)
        if policy == GROWN_BY:
            nodes, pattern = row["search_result"]["tree"]["nodes"], config_of(row).answer_pattern
            known[data, width] += tune.known_levels(nodes, row["expected"], pattern, grader, number)
    return {
        (data, width, name): {"levels": len(levels), **asdict(tune.quality(levels, own, width))}
        for (data, width), levels in known.items()
        for name, own in tune.candidates()
    }


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """A line for each data set, width and setting, from the least KV; of two rows the later."""
    latest = {(row["data"], row["width"], row["policy"]): row for row in done}
    ordered = sorted(latest.items(), key=lambda item: (*item[0][:2], item[1]["kv_kept"]))
    cells = [
        [*key, row["levels"], *(f"{row[name]:.3f}" if name in row else "" for name in FIGURES)] for key, row in ordered
    ]
    return rows.markdown(HEADER, cells)


if __name__ == "__main__":
    saved.main("survivors", __doc__, saved.graded(figures_of), table)
