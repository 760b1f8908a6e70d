"""Figures of the benches: panels side by side, drawn without a display."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 110


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


def curves(axis: Any, points: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """One line a policy through its (KV tokens held, accuracy), in order of KV. A name that is a number is an ETS weight."""
    for name, own in points.items():
        label = f"ets d={name}" if name[0].isdigit() else name
        axis.plot(*zip(*sorted(own), strict=True), marker="o", markersize=4, label=label)
    axis.set(title=title, xlabel="KV tokens held (mean over levels)", ylabel="accuracy")
