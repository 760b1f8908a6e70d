"""Result rows: the run that each belongs to, and that a run of changed files is not committed."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import rows
from bench.rows import DIRTY, RESULTS, command, commit_of

COMMITTED = sorted(path for path in RESULTS.glob("*.jsonl") if not path.stem.endswith("_smoke"))


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", *identity, *args], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("bench/run.py", "bench/results/rows.jsonl", "models/weights", "README.md", "docs/results.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


@pytest.mark.parametrize(
    "changed", ["bench/results/rows.jsonl", "README.md", "docs/results.md", "bench/results/new.jsonl", "notes"]
)
def test_rows_and_untracked_files_leave_a_checkout_clean(checkout: Path, changed: str) -> None:
    (checkout / changed).write_text("two")
    assert commit_of(checkout / "bench") == git(checkout, "rev-parse", "--short", "HEAD")


@pytest.mark.parametrize("changed", ["bench/run.py", "models/weights"])
def test_a_changed_file_is_said(checkout: Path, changed: str) -> None:
    (checkout / changed).write_text("two")
    assert commit_of(checkout / "bench") == git(checkout, "rev-parse", "--short", "HEAD") + "-dirty"


def test_a_folder_outside_any_checkout_is_unknown(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == "unknown"


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("/somewhere/bench/searches.py", "bench.searches"),
        ("/a/bench/bench/studies/selection_quality.py", "bench.studies.selection_quality"),
    ],
)
def test_a_recorded_command_can_be_pasted_and_names_no_folder_of_this_machine(script: str, module: str) -> None:
    argv = [script, "--only", "ets b=4", "rebase", "--out", "/tmp/here/rows.jsonl"]
    assert command(argv) == f"python -m {module} --only 'ets b=4' rebase --out rows.jsonl"


def made_by(commit: str) -> dict[str, Any]:
    return {"commit": commit, "command": "python -m bench.ilp"}


def test_a_run_is_written_once_and_its_rows_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    for commit in ("aaa", "bbb"):
        monkeypatch.setattr(rows, "provenance", lambda commit=commit: made_by(commit))
        monkeypatch.setattr(rows, "_begun", {})  # another process
        rows.append(path, {"value": 1})
        rows.append(path, {"value": 2})
    assert rows.runs(path) == {1: made_by("aaa"), 2: made_by("bbb")}
    assert [(row["run"], row["value"]) for row in rows.read(path)] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_a_dirty_checkout_writes_no_committed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    rows.add_arguments(parser, "little")
    monkeypatch.setattr(rows, "provenance", lambda: made_by("aaa" + DIRTY))
    with pytest.raises(SystemExit, match="commit them first, or name another file with --out"):
        rows.out_of(parser.parse_args([]), "ilp")
    assert rows.out_of(parser.parse_args(["--smoke"]), "ilp") == RESULTS / "ilp_smoke.jsonl"
    assert rows.out_of(parser.parse_args(["--out", str(tmp_path)]), "ilp") == tmp_path
    monkeypatch.setattr(rows, "provenance", lambda: made_by("aaa"))
    assert rows.out_of(parser.parse_args([]), "ilp") == RESULTS / "ilp.jsonl"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_rows_are_of_runs_of_a_commit(path: Path) -> None:
    runs = rows.runs(path)
    assert {row["run"] for row in rows.read(path)} == set(runs)
    dirty = {run["commit"] for run in runs.values() if run["commit"].endswith(DIRTY)}
    assert not dirty
    assert not [
        run["command"] for run in runs.values() if " /" in run["command"] and "/tmp/encoder" not in run["command"]
    ]
