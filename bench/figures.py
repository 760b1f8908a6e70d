"""Figures of the benches, drawn without a display. A colour means the same policy in each of them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.tables import BASELINE, frontier

DOTS_PER_INCH = 110
COMPARABLE = 0.9  # of the most problems in a panel: with fewer, a point is pale and beside the frontier
FEWEST_POINTS = 5  # of a panel: less is a table
TITLE_LETTERS = 70  # of a line over a panel
COLOURS = {
    "best_of_n": "#7f7f7f", "beam": "#b8860b", "dvts": "#2a9d4e", "dora": "#e377c2", "particles": "#17becf",
    "subpool": "#8c564b",
    "rebase": "#000000", "ets_kv": "#1f77b4", "ets": "#d62728", "ets reward": "#ff7f0e",
    "ets uniform": "#9467bd", "ets published": "#9467bd",
}  # fmt: skip
MARKERS = {"0.5": "v", "1": "o", "2": "s", "4": "D"}  # by kv_cost_weight
FILLS: dict[str, Any] = {"1": "none", "2": "left"}  # by diversity_weight, where a figure has several; else full


@contextmanager
def panels(path: Path, count: int, width: float = 5, height: float = 4, **options: Any) -> Iterator[list[Any]]:
    """Axes of `count` panels, `width` by `height` inches each; the figure is written to `path` when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False, **options)
    try:
        yield list(axes[0])
        figure.tight_layout()
        figure.savefig(path, dpi=DOTS_PER_INCH)
    finally:
        pyplot.close(figure)


def weight(policy: str, name: str) -> str | None:
    """`weight("ets b=4 d=0", "b")` is 4; None if the name does not say it."""
    given = re.search(rf"\b{name}=(\S+)", policy)
    return given[1] if given else None


def colour(policy: str) -> str:
    """Of a policy by its name in the tables; ETS that covers nothing is `ets_kv`."""
    return COLOURS["ets_kv" if weight(policy, "d") == "0" else re.split(r" \w=|, ", policy)[0]]


def accuracy_against_kv(by_title: Mapping[str, tuple[str, Sequence[dict[str, Any]]]], path: Path) -> None:
    """Accuracy minus that of REBASE against the share of REBASE's KV, both on the same problems, with 95 % intervals.

    A panel for each title and width with points enough; a grey line joins the policies that
    no other dominates, of those that have solved most problems.
    """
    searched = {
        f"width {width}, {title}": [s for s in summaries if s["width"] == width and "kv_reduction" in s]
        for title, (_, summaries) in by_title.items()
        for width in sorted({s["width"] for s in summaries})
    }
    shown = {title: own for title, own in searched.items() if len(own) >= FEWEST_POINTS} or searched
    with panels(path, len(shown), width=8.2, height=5) as axes:
        for axis, (title, own) in zip(axes, shown.items(), strict=True):
            _compare(axis, own)
            axis.set(
                title=textwrap.fill(title, TITLE_LETTERS),
                xlabel="KV held, as a share of REBASE's",
                ylabel="accuracy minus REBASE's",
            )


def _compare(axis: Any, own: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import PercentFormatter

    points = [_point(s) for s in own]
    most = COMPARABLE * max(s["problems"] for s in own)
    pairs = [(s, p) for s, p in zip(own, points, strict=True) if s["problems"] >= most]
    edge = frontier({"kv_tokens_mean": p["x"], "accuracy": p["y"]} for _, p in pairs)
    axis.plot(
        [e["kv_tokens_mean"] for e in edge], [e["accuracy"] for e in edge],
        color="0.6", linewidth=4, alpha=0.5, marker="o", markersize=13, label="not dominated", zorder=1,
    )  # fmt: skip
    axis.axhline(0, color="0.85", zorder=0)
    for s, p in sorted(zip(own, points, strict=True), key=lambda pair: pair[0]["policy"]):
        b, d = (weight(s["policy"], name) or "" for name in "bd")
        marker, fill, own_colour = MARKERS.get(b, "o"), FILLS.get(d, "full"), colour(s["policy"])
        axis.errorbar(
            p["x"], p["y"], xerr=p["x_error"], yerr=p["y_error"], fmt=marker, fillstyle=fill, color=own_colour,
            markersize=6, elinewidth=0.7, alpha=0.95 if s["problems"] >= most else 0.4,
            label=f"{s['policy']} ({s['problems']})",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.xaxis.set_minor_formatter(PercentFormatter(1.0, decimals=0))
    axis.tick_params(which="both", labelsize=8, length=3, pad=4)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="policy (problems)")


def _point(s: dict[str, Any]) -> dict[str, Any]:
    """Where a summary stands beside REBASE, and how far its intervals reach down and up."""
    if s["policy"] == BASELINE:
        return {"x": 1.0, "y": 0.0, "x_error": None, "y_error": None}
    x, y = 1 / s["kv_reduction"], s["difference"]
    return {
        "x": x, "x_error": [[x - 1 / s["kv_high"]], [1 / s["kv_low"] - x]],
        "y": y, "y_error": [[y - s["low"]], [s["high"] - y]],
    }  # fmt: skip
