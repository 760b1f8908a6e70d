"""`make drift VERSION=0.5.22`: what another version of sglang would change for each patch, without installing it.

A wheel is downloaded without what it requires, its Python files are unpacked into a temporary folder, parsed and compared with
the records; nothing of it is imported. Without a version the installed sglang is compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from sglang_ets.patches import PATCHES
from sglang_ets.patches.docs import markdown_table, short
from sglang_ets.patches.record import Comparison, Patch
from sglang_ets.patches.sources import PACKAGE, Sources

PIP = ("-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary", ":all:")


def fetch(version: str, folder: Path) -> Path:
    """Download the wheel of a version.

    Raises:
        SystemExit: pip cannot.
    """
    command = [sys.executable, *PIP, "--dest", str(folder), f"{PACKAGE}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"pip found no wheel of sglang {version}; give a version that `pip index versions sglang` lists\n{done.stderr}"
        )
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Sources:
    """The wheel's Python files, in `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if n.startswith(f"{PACKAGE}/") and n.endswith(".py")])
    return Sources(folder)


def compare(sources: Sources, patches: Iterable[Patch] = PATCHES) -> list[Comparison]:
    return [patch.compare(sources) for patch in patches]


def report(compared: Sequence[Comparison]) -> str:
    """A line for each patch: what changed upstream, and what to do about it."""
    rows = [(f"{c.patch.kind} `{short(c.patch.target)}`", c.change, what_to_do(c)) for c in compared]
    counts = {change: sum(c.change == change for c in compared) for change in ("none", "text", "contract")}
    total = ", ".join(f"{change} {count}" for change, count in counts.items())
    return f"{markdown_table(('target', 'upstream change', 'what to do'), rows)}\n\n{total}"


def what_to_do(compared: Comparison) -> str:
    if compared.change == "none":
        return "nothing"
    if compared.change == "text":
        return f"read the new code and run the tests; if they pass, add `{compared.code_hash}` to `tested`"
    return f"adapt `{compared.patch.hook.split(':')[1]}`: {'; '.join(map(short, compared.breaks))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns 1 if a contract is broken."""
    parser = argparse.ArgumentParser(prog="python -m sglang_ets.patches.drift", description=__doc__.split("\n\n")[0])
    parser.add_argument("version", nargs="?", help="a version on the package index, or a wheel; default: as installed")
    version = parser.parse_args(argv).version
    with tempfile.TemporaryDirectory(prefix="sglang-drift-") as name:
        folder = Path(name)
        if version is None:
            sources = Sources.installed()
        else:
            wheel = Path(version) if version.endswith(".whl") else fetch(version, folder)
            sources = unpack(wheel, folder)
        compared = compare(sources)
    print(report(compared))
    return int(any(c.change == "contract" for c in compared))


if __name__ == "__main__":
    sys.exit(main())
