"""`sglang-ets tune run.jsonl`: how hard this model and this PRM let ETS prune, from searches that have run.

    sglang-ets run --data gsm8k --split validation --limit 60 --algorithm rebase --set return_embeddings=true --out run.jsonl
    sglang-ets tune run.jsonl

Nobody knows of a real model's step whether it is right, but a REBASE tree shows what came of each leaf that went on: the
answers of the trajectories below it. A leaf counts as right if one of them is. Each setting selects from the very same levels,
less the leaves that REBASE itself gave up, of which nothing is known. A level counts if it has right leaves and others. `lost`
is the share of levels of which a setting keeps no right leaf; `by chance` is what as many leaves, drawn blindly, would have
lost: a PRM that knows nothing does no better. A search passes many levels, and one that is lost is enough: `searches lost` is
the share of searches with such a level. Suggested is the setting that keeps the least KV and loses no more searches than REBASE
and `--tolerance`. How far that can be relied on is said too: of how many searches it is, and what share of others it may lose.
Use problems that you will not report on, and that the PRM has not learned from.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy.stats import binomtest, hypergeom

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.patterns import extract_answer
from sglang_ets.core.selection import Level
from sglang_ets.testing import levels_of, path_to
from sglang_ets.tools.ask import EXIT_BAD_INPUT
from sglang_ets.tools.evaluate import Grader
from sglang_ets.tools.run import console_of, rows_in

GROWN_BY = "rebase"
FEW_SEARCHES = 50
ONE_SELECTION = f"shares are of one selection on trees of {GROWN_BY}; run the setting itself before you rely on them"
HEADER = (
    "setting", "leaves kept", "KV kept", "answers kept", "width on right leaves", "lost", "by chance", "searches lost",
)  # fmt: skip
Node = Mapping[str, Any]
Settings = Mapping[str, Any]  # of a request's `search`


@dataclass(frozen=True, eq=False)
class KnownLevel:
    """A level whose leaves all went on, and what came of them."""

    level: Level
    answers: tuple[frozenset[str | None], ...]  # L sets, of the trajectories below each leaf
    is_right: NDArray[np.bool_]  # bool[L], one of them is right
    search: int  # a number of the search that it is of


@dataclass(frozen=True)
class Quality:
    """What a setting keeps, means over levels."""

    kept: float  # share of the leaves
    kv_kept: float  # share of the KV
    answers_kept: float  # share of the different answers
    right_width: float  # share of the width that right leaves get
    lost: float  # share of the levels of which no right leaf is kept
    lost_by_chance: float  # the same if as many leaves were drawn blindly
    searches_lost: float  # share of the searches that lose a level


def known_levels(
    nodes: Sequence[Node], expected: str, pattern: str, grader: Grader, search: int
) -> Iterator[KnownLevel]:
    """The levels of a REBASE tree that have right leaves and others; `search` is the tree's number."""
    went_on = [node for node in nodes if node["state"] != "pruned"]
    below = _answers_below(went_on, pattern)
    for level, leaf_ids in levels_of(went_on):
        answers = tuple(frozenset(below[leaf_id]) for leaf_id in leaf_ids)
        right = np.array([any(grader.of(one, expected).is_right for one in own) for own in answers])
        if right.any() and not right.all():
            yield KnownLevel(level, answers, right, search)


def _answers_below(nodes: Sequence[Node], pattern: str) -> Mapping[int, set[str | None]]:
    """Node id -> the answers of the complete trajectories that end in it or below it."""
    by_id = {node["id"]: node for node in nodes}
    below: dict[int, set[str | None]] = defaultdict(set)
    for end in (node for node in nodes if node["state"] == "complete"):
        path = path_to(end, by_id)
        answer = extract_answer("".join(step["text"] for step in path), pattern)
        for step in path:
            below[step["id"]].add(answer)
    return below


def quality(levels: Sequence[KnownLevel], settings: Settings, width: int) -> Quality:
    """What these settings keep of these levels."""
    return replay(levels, settings, width)[0]


def replay(levels: Sequence[KnownLevel], settings: Settings, width: int) -> tuple[Quality, frozenset[int]]:
    """What these settings keep of these levels, and the searches that they lose."""
    config = SearchConfig.from_request(width, settings, {}, n=None, max_tokens=None, seed=None)
    figures = np.array([_of_level(item, config) for item in levels])
    is_lost = figures[:, [field.name for field in fields(Quality)].index("lost")]
    lost = frozenset(item.search for item, loses in zip(levels, is_lost, strict=True) if loses)
    share_lost = len(lost) / num_searches(levels)
    return Quality(*map(float, [*figures.mean(axis=0), share_lost])), lost


def num_searches(levels: Sequence[KnownLevel]) -> int:
    """Searches that have such a level."""
    return len({item.search for item in levels})


def _of_level(item: KnownLevel, config: SearchConfig) -> tuple[float, ...]:
    allocation = config.policy.select(item.level, config).allocation
    kept, right = allocation > 0, item.is_right
    survived: set[str | None] = set().union(*(item.answers[place] for place in np.flatnonzero(kept)))
    assert item.level.kv is not None
    return (
        kept.mean(),
        item.level.kv.share_held(kept),
        len(survived) / len(set().union(*item.answers)),
        allocation[right].sum() / allocation.sum(),
        not right[kept].any(),
        hypergeom.pmf(0, kept.size, right.sum(), kept.sum()),
    )


def candidates() -> Iterator[tuple[str, Settings]]:
    """A name, and what a request with this setting would carry. REBASE comes first."""
    yield GROWN_BY, {"algorithm": GROWN_BY}
    for temperature in (0.1, 0.05, 0.02):
        yield f"rebase T={temperature:g}", {"algorithm": GROWN_BY, "rebase_temperature": temperature}
    yield "ets published", {"algorithm": "ets", "preset": "paper"}
    for weight in (0.5, 1.0, 2.0):
        yield f"ets_kv b={weight:g}", {"algorithm": "ets_kv", "kv_cost_weight": weight}
    for coverage, weights in (("uniform", (1.0, 1.5, 2.0)), ("reward", (1.0, 2.0, 4.0))):
        for weight in weights:
            for cut in (0.05, 0.1, 0.3):
                own = {"coverage": coverage, "kv_cost_weight": weight, "cluster_distance": cut}
                yield f"ets {coverage} b={weight:g} cut={cut:g}", {"algorithm": "ets", **own}


def suggested(found: Mapping[str, Quality], tolerance: float) -> str:
    """The candidate that keeps the least KV among those that lose no more searches than REBASE and this share of all."""
    most = found[GROWN_BY].searches_lost + tolerance
    return min((name for name in found if found[name].searches_lost <= most), key=lambda name: found[name].kv_kept)


def reliance(lost: frozenset[int], lost_by_base: frozenset[int], count: int) -> str:
    """What is known of the searches that a setting loses and REBASE does not, `count` having been looked at."""
    more = len(lost - lost_by_base)
    low, high = binomtest(more, count).proportion_ci()
    few = f"; {count} searches are few, so this is a hint, run {FEW_SEARCHES} or more" if count < FEW_SEARCHES else ""
    return f"it loses {more} of {count} searches that {GROWN_BY} does not lose (95 %: {low:.0%} to {high:.0%} of others){few}"


def flags_of(settings: Settings) -> str:
    """The server's flags that make it the default."""
    flags = {"search": settings["algorithm"]}
    flags |= {f"search-{name.replace('_', '-')}": value for name, value in settings.items() if name != "algorithm"}
    return " ".join(
        f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}" for name, value in flags.items()
    )


def levels_in(paths: Sequence[Path], pattern: str) -> tuple[int, list[KnownLevel]]:
    """Width and levels of the REBASE searches in these files.

    Raises:
        ValueError: there are none, they have no embeddings or several widths, or no level tells anything.
        OSError: a file cannot be read.
    """
    rows = [row for path in paths for row in rows_in(path) if row["search_result"]["algorithm"] == GROWN_BY]
    widths = sorted({row["width"] for row in rows})
    if len(widths) != 1:
        raise ValueError(f"searches of {GROWN_BY} must have one width, got {widths or 'none'}; run some of one width")
    with Grader() as grader:
        levels = [
            level
            for number, row in enumerate(rows)
            for level in known_levels(row["search_result"]["tree"]["nodes"], row["expected"], pattern, grader, number)
        ]
    if not levels:
        raise ValueError(
            f"levels must have leaves that led to a right answer and others, got none in {len(rows)} searches; run more "
            "problems, or give the --answer-pattern of the run"
        )
    if levels[0].level.embeddings is None:
        raise ValueError("trees must have embeddings, got none; run with --set return_embeddings=true")
    return widths[0], levels


def table_of(found: Mapping[str, Quality], title: str) -> Table:
    """From the least KV to the most."""
    table = Table(title=title)
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="right" if number else "left")
    for name, own in sorted(found.items(), key=lambda item: item[1].kv_kept):
        table.add_row(name, *(f"{value:.3f}" for value in astuple(own)))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """A table and a suggestion. Exits with 2 after one sentence if a file cannot be used."""
    made = argparse.ArgumentParser(prog="sglang-ets tune", description="How hard a model and its PRM let ETS prune.")
    made.add_argument(
        "rows", type=Path, nargs="+", help="files of `sglang-ets run --algorithm rebase`, with embeddings"
    )
    made.add_argument("--answer-pattern", default="boxed", help="where the answer stands (default boxed)")
    made.add_argument(
        "--tolerance", type=float, default=0.1, help="searches lost beyond REBASE's, a share (default 0.1)"
    )
    args = made.parse_args(arguments)
    try:
        width, levels = levels_in(args.rows, args.answer_pattern)
    except (ValueError, OSError) as error:
        print(f"sglang-ets tune: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error
    settings = dict(candidates())
    replays = {name: replay(levels, own, width) for name, own in settings.items()}
    found = {name: quality for name, (quality, _) in replays.items()}
    count = num_searches(levels)
    console_of().print(table_of(found, f"width {width}, {len(levels)} levels of {count} searches"))
    best = suggested(found, args.tolerance)
    print(
        f"suggested: {flags_of(settings[best])}  ({best}; at most {args.tolerance:g} more searches lost than {GROWN_BY})"
    )
    print(reliance(replays[best][1], replays[GROWN_BY][1], count))
    print(ONE_SELECTION)
