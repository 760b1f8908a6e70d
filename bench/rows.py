"""Result rows: one JSON object a line, each with the hardware, versions, commit and command that made it."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("sglang", "torch", "triton", "highspy", "numpy")


@functools.cache
def provenance() -> dict[str, Any]:
    """Where and with what a row was made."""
    return {
        "hardware": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit_of(Path(__file__).parent),
        "command": command(sys.argv),
    }


def command(argv: Sequence[str]) -> str:
    """The command line of a bench, to be pasted in the root of a clone; of absolute paths only the name is left."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv[1:]]
    return shlex.join(["python", "-m", f"bench.{Path(argv[0]).stem}", *words])


def commit_of(folder: Path) -> str:
    """The commit of the checkout that `folder` belongs to, `-dirty` if tracked files differ from it.

    Result rows and the pages that are written from them may differ: none is run.
    """
    commit = _git(folder, "rev-parse", "--short", "HEAD") or "unknown"
    written = ("bench/results", "README.md", "docs/results.md")
    rows_aside = (":/", *(f":(top,exclude){path}" for path in written))
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *rows_aside)
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def add_arguments(parser: argparse.ArgumentParser, smoke: str) -> None:
    """`--smoke`, which does what `smoke` says, and `--out`."""
    parser.add_argument("--smoke", action="store_true", help=f"{smoke}, into a file of its own")
    parser.add_argument("--out", type=Path, help="rows, JSONL; default: the file of this bench under bench/results/")


def out_of(args: argparse.Namespace, name: str) -> Path:
    """The file that a bench writes its rows to."""
    return args.out or RESULTS / f"{name}{'_smoke' if args.smoke else ''}.jsonl"


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row and flush it, so that an interrupted run keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps({**row, "made_by": provenance()}) + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A markdown table; floats with three significant places, without an exponent."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(figure(cell) if isinstance(cell, float) else str(cell) for cell in row) + " |")
    return "\n".join(lines)


def figure(value: float) -> str:
    """Three significant places, and whole numbers from 1000 on."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
