"""`sglang-ets COMMAND` reaches the right module, and imports no engine on the way."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_ets import cli
from sglang_ets.engine.metrics import METRICS, PREFIX

HEAVY = ("sglang", "torch", "openai")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `serve` would have become."""
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _path, argv: calls.append(list(argv)))
    return calls


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        (["serve"], []),
        (["serve", "--help"], ["--help"]),
        (["serve", "--model-path", "m", "--port", "1"], ["--model-path", "m", "--port", "1"]),
        (["--search", "ets"], ["--search", "ets"]),
        (["--model-path=m"], ["--model-path=m"]),
    ],
)
def test_serve_hands_all_flags_on(argv: list[str], flags: list[str], started: list[list[str]]) -> None:
    cli.main(argv)
    assert started == [[sys.executable, "-m", "sglang_ets.launch_server", *flags]]


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["fly"], 2), (["--help"], 0), (["-h"], 0)])
def test_help_names_the_commands(
    argv: list[str], status: int, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == status
    said = "".join(capsys.readouterr())
    assert started == []
    assert status == 2 or all(name in said for name in cli.COMMANDS)
    assert "invalid choice: 'fly'" in said or argv != ["fly"]


@pytest.mark.parametrize("name", ["ask", "view", "calibrate", "plan"])
def test_tools_get_the_rest_of_the_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[name][0]), "main", got.append)
    cli.main([name, "--some", "thing"])
    assert got == [["--some", "thing"]]


@pytest.mark.parametrize("module", [module for module, _ in cli.COMMANDS.values()])
def test_every_command_has_a_main(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_view_imports_no_engine() -> None:
    script = (
        "import sys\nfrom sglang_ets import cli\n"
        "try:\n    cli.main(['view', 'no-such-file.json'])\nexcept SystemExit as left:\n    assert left.code == 2\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "no-such-file.json" in done.stderr


def test_docs_name_metrics_and_commands_that_exist() -> None:
    page = (Path(__file__).parent.parent / "docs" / "observability.md").read_text(encoding="utf-8")
    exposed = {name for metric in METRICS for name in metric.exposed_names}
    named = set(re.findall(rf"\b{PREFIX}\w+", page))
    assert named and named <= exposed
    commands = set(re.findall(r"^    sglang-ets (\w+)", page, re.MULTILINE))
    assert {"ask", "view"} <= commands <= set(cli.COMMANDS)
