"""What README and docs/ tell a reader to type: found by form, so that no command is overlooked.

An indented block holds shell commands; anything else that is shown stands in a fence that names its language.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHOWN_LANGUAGES = ("text", "diff", "yaml", "python")  # of fences; what is to be typed in a shell is an indented block
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")
PROGRAMS = ("make", "python", "sglang-ets", "curl", "lm-eval", "pip", "bash")
URL = "http://127.0.0.1:30000"  # of the server in every page

Way = Literal["started", "run", "served", "foreign", "own"]
# How a command of a page is tested, by what it begins with.
WAYS: dict[str, Way] = {
    "make": "started",  # starts a server, installs, or takes minutes: target, module and flags must exist
    "pip": "started",
    "python": "started",
    "sglang-ets serve --search top_k": "own",  # by a test of its page: tests/test_policies.py
    "# top_k.py": "own",
    "from sglang_ets.testing": "own",
    "sglang-ets serve": "started",
    "sglang-ets run": "started",  # tests/tools runs them, and the tutorial's on a server
    "sglang-ets evaluate": "started",
    "sglang-ets top": "started",
    "sglang-ets tune": "started",
    "sglang-ets compare": "started",  # tests/tools/test_compare.py
    "sglang-ets import-yaml": "started",
    "sglang-ets plan": "run",
    "sglang-ets view": "run",
    "sglang-ets ask": "served",  # run against one server
    "sglang-ets calibrate": "served",
    "curl": "served",
    "import openai": "served",
    "from sglang_ets import Engine": "own",  # tests/e2e/test_offline.py
    "lm-eval": "foreign",  # not installed here: its search must be one, and test_client_wire replays what it sent
    "from langchain_openai": "foreign",
    "from openai import OpenAI": "foreign",  # a chat with a model of 7B
}


@dataclass(frozen=True)
class Command:
    """Something to type, or a Python program to run."""

    page: str
    kind: Literal["shell", "inline", "python"]
    text: str

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def way(self) -> Way | None:
        """None: nobody has said how it is tested."""
        return next((way for start, way in WAYS.items() if self.text.startswith(start)), None)


def commands(way: Way | None = None) -> list[Command]:
    """Of all pages, in order; those that are tested in this way, or all. What prose only mentions has no way of its own."""
    every = [command for page in PAGES for command in of_page(page.name, page.read_text(encoding="utf-8"))]
    return [one for one in every if way is None or (one.kind != "inline" and one.way == way)]


def of_page(page: str, text: str) -> Iterator[Command]:
    """The commands of one page."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        assert language in SHOWN_LANGUAGES, f"{page}: a fence must name one of {SHOWN_LANGUAGES}, got {language!r}"
        if language == "python":
            yield Command(page, "python", body)
    prose = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.findall(INDENTED, prose):
        for line in _joined(block):
            yield Command(page, "shell", line)
    prose = re.sub(INDENTED, "", prose)
    for code in re.findall(r"`([^`]+)`", prose):
        if code.split()[:1] and code.split()[0] in PROGRAMS:
            yield Command(page, "inline", " ".join(code.split()))


def _joined(block: str) -> Iterator[str]:
    """Commands of a block: one goes on after a backslash, and while a quote is open. Comments go."""
    pending = ""
    for line in block.splitlines():
        pending += line.removeprefix("    ")
        if pending.endswith("\\"):
            pending = f"{pending[:-1].rstrip()} "
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is open
            pending += "\n"
            continue
        if words:
            yield shlex.join(words)
        pending = ""
    assert not pending, f"a command does not end: {pending}"
