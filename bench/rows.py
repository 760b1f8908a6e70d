"""Result rows: one JSON object a line. A run writes first where and with what it is made; its rows name it by its number.

{"run": 1, "made_by": {"hardware": ..., "python": ..., "versions": ..., "commit": ..., "command": ...}}
{"run": 1, "policy": "rebase", ...}
"""

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
# Written anew from rows (bench/readme.py), so a change of theirs makes no commit dirty.
PAGES = ("README.md", "docs/results.md", "docs/reliability.md", "docs/speed.md", "docs/gpu.md")
PACKAGES = ("sglang", "torch", "triton", "highspy", "numpy")
DIRTY = "-dirty"
COMMIT_FILE = "commit.txt"  # of a copy that is carried to a machine without git (bench/gpu/prepare.py)

Row = dict[str, Any]


@functools.cache
def provenance() -> dict[str, Any]:
    """Where and with what this process makes rows."""
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
    parts = Path(argv[0]).with_suffix("").parts
    folders = parts[:-1]
    first = len(folders) - folders[::-1].index("bench") - 1 if "bench" in folders else len(folders)
    return shlex.join(["python", "-m", ".".join(parts[first:]), *words])


def commit_of(folder: Path) -> str:
    """The commit of the checkout that `folder` belongs to, with `DIRTY` if tracked files differ from it; of a copy of `bench/`
    beside which `COMMIT_FILE` stands, what that says.

    Result rows and the pages that are written from them may differ: none is run.
    """
    carried = folder.parent / COMMIT_FILE
    if carried.exists():
        return carried.read_text(encoding="utf-8").strip()
    commit = _git(folder, "rev-parse", "--short", "HEAD") or "unknown"
    rows_aside = (":/", *(f":(top,exclude){path}" for path in ("bench/results", *PAGES)))
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *rows_aside)
    return f"{commit}{DIRTY}" if changed else commit


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
    """The file that a bench writes its rows to.

    Raises:
        SystemExit: it would be the committed file, and the checkout has changes that no commit names.
    """
    reads_only = getattr(args, "tables", False)
    if not (args.smoke or args.out or reads_only) and provenance()["commit"].endswith(DIRTY):
        raise SystemExit(
            f"rows in bench/results must be of a commit, but tracked files differ from {provenance()['commit']}; "
            "commit them first, or name another file with --out"
        )
    return args.out or RESULTS / f"{name}{'_smoke' if args.smoke else ''}.jsonl"


_begun: dict[Path, int] = {}  # the number of this process's run in each file


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row and flush it, so that an interrupted run keeps what it has; the first begins a run."""
    if path not in _begun:
        path.parent.mkdir(parents=True, exist_ok=True)
        _begun[path] = len(runs(path)) + 1
        _write(path, {"run": _begun[path], "made_by": provenance()})
    _write(path, {"run": _begun[path], **row})


def _write(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def runs(path: Path) -> dict[int, Row]:
    """Of each run its `made_by`, by its number."""
    return {line["run"]: line["made_by"] for line in _lines(path) if "made_by" in line}


def read(path: Path) -> Iterator[Row]:
    """The rows of all runs, in the file's order."""
    return (line for line in _lines(path) if "made_by" not in line)


def _lines(path: Path) -> Iterator[Row]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def latest(name: str, key: Sequence[str]) -> list[Row]:
    """The newest row of each key of a bench's committed rows, in order of the key."""
    by_key = {tuple(row[part] for part in key): row for row in read(RESULTS / f"{name}.jsonl")}
    return [by_key[place] for place in sorted(by_key)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; floats with three significant places, without an exponent."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(figure(cell) if isinstance(cell, float) else str(cell) for cell in row) + " |")
    return "\n".join(lines)


def figure(value: float) -> str:
    """Three significant places, and whole numbers from 1000 on."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def publish(out: Path, text: str) -> None:
    """Print the tables of a bench and keep them beside its rows."""
    out.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
