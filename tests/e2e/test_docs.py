"""Commands of README and docs that need a server, typed as they stand there, against one server. See `tests/documented.py`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import URL, Command, commands
from tests.e2e.serving import Server

pytestmark = pytest.mark.server

# What a command says: it asks the server at the default address, and draws a fresh seed. Here: this server, and one seed.
ADDED = {
    "ask": ["--base-url", URL, "--seed", "0"],
    "calibrate": ["--base-url", URL],
    "run": ["--base-url", URL],
    "top": ["--base-url", URL],
}


def typed(command: Command, server: Server, folder: Path) -> str:
    """What the command prints in a folder of its own.

    Raises:
        AssertionError: it failed.
    """
    argv = [sys.executable, "-c", command.text] if command.kind == "python" else command.argv
    argv = argv[:2] + ADDED.get(argv[1], []) + argv[2:]  # what stands there goes before what is added
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [word.replace(URL, server.url) for word in argv],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ASKED = {
    "7*8-2*(3+4)=": "42",
    "(1+8)*(17-9)+(20-15+15*2+2+9-19)=": "99",
    "10*18-19-15+(13*4-15)=": "183",
}


@pytest.mark.parametrize(
    "command", commands("served"), ids=lambda command: f"{command.page}: {' '.join(command.argv[:2])}"
)
def test_it_does_what_its_page_says(command: Command, server: Server, tmp_path: Path) -> None:
    out = typed(command, server, tmp_path)
    match command.argv[:2]:
        case ["curl", _]:
            answer = json.loads(out)
            assert len(answer["choices"]) == 2
            assert answer["choices"][0]["text"].endswith("The answer is 139")
            search = answer["search"]
            assert (search["width"], search["algorithm"], search["kv_cost_weight"]) == (16, "ets", 2.0)
            assert (search["warnings"], search["kv_cost_weight_max"]) == ([], None)
        case ["import", "openai"]:
            text, peak_tokens = out.rstrip().rsplit("\n", 1)
            assert text.endswith("The answer is 183")
            assert int(peak_tokens) > 0
        case ["sglang-ets", "ask"]:
            answer, saved = ASKED[command.argv[2]], Path(command.argv[command.argv.index("--tree") + 1])
            assert re.search(rf"^│ 1 │ {answer} ", out, re.MULTILINE), out
            assert out.rstrip().endswith(f"tree saved; look at it with: sglang-ets view {saved}")
            view, page = Command(command.page, "shell", f"sglang-ets view {saved}"), saved.with_suffix(".html").name
            assert typed(view, server, tmp_path).strip() == page
            assert f"The answer is {answer}" in (tmp_path / page).read_text(encoding="utf-8")
        case ["sglang-ets", "calibrate"]:
            (cut,) = re.findall(r"suggested --search-cluster-distance ([\d.]+);", out)
            assert 0 < float(cut) < 2
        case argv:
            pytest.fail(f"nobody looks at the outcome of {argv}")


def test_the_tutorial_goes_from_problems_to_tables(server: Server, tmp_path: Path) -> None:
    """Its commands in the order of the page, in one folder. What it asks first is tested above."""
    typed_there = [one for one in commands() if one.page == "tutorial.md" and one.kind == "shell"]
    assert [one.argv[1] for one in typed_there] == [
        *("serve", "ask", "view", "run", "top", "evaluate", "compare", "run", "tune")
    ]
    *first, run_rebase, tune = typed_there
    steps = {one.argv[1]: one for one in first}
    table = typed(steps["run"], server, tmp_path)
    assert len(re.findall(r"^│ embedded │ +[48] │ (?:rebase|ets) ", table, re.MULTILINE)) == 4
    assert len((tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    assert "searches, oldest first" in typed(steps["top"], server, tmp_path)
    chosen = typed(steps["evaluate"], server, tmp_path)
    assert chosen.count("weighted majority") == 16, "four tables with four ways to aggregate"
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    typed(run_rebase, server, tmp_path)
    said = typed(tune, server, tmp_path)
    (flags,) = re.findall(r"^suggested: (--search .*?)  \(", said, re.MULTILINE)
    assert "by chance" in said and "--search-kv-cost-weight" in flags
