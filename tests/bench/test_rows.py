"""What a result row says about where it was made."""

import subprocess
from pathlib import Path

import pytest

from bench.rows import command, commit_of


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


def test_a_recorded_command_can_be_pasted_and_names_no_folder_of_this_machine() -> None:
    argv = ["/somewhere/bench/kv_footprint.py", "--only", "ets b=4", "rebase", "--out", "/tmp/here/rows.jsonl"]
    assert command(argv) == "python -m bench.kv_footprint --only 'ets b=4' rebase --out rows.jsonl"
