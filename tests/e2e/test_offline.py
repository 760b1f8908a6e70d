"""`sglang_ets.Engine` in scripts of its own: the example of the docs, refusals, and no process left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import commands
from tests.e2e.serving import Server

pytestmark = pytest.mark.server

LIMIT_S = 300
# Put into the example's block, after its own lines.
MORE = """
        try:
            engine.search("1+2=", 1)
        except ValueError as refusal:
            print("refused:", refusal)
        print("plain:", engine.sglang.generate("1+2=", {"max_new_tokens": 8, "temperature": 0})["text"].strip())
    import psutil
    print("left:", [child.name() for child in psutil.Process().children(recursive=True) if "sglang" in child.name()])
    print("nodes:", result.search["nodes_made"], repr(result.text), len(result.answers), result.tree)
"""


def test_the_example_searches_without_a_server(server: Server, tmp_path: Path) -> None:
    (example,) = [one for one in commands("own") if "Engine" in one.text]
    script = tmp_path / "script.py"
    script.write_text(example.text + MORE, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    prompt = "10*18-19-15+(13*4-15)=\n"
    served = server.search(prompt, 8, seed=1, max_tokens=160, n=2, search={"algorithm": "rebase"})
    nodes, text = served["search"]["nodes_made"], served["choices"][0]["text"]
    assert f"nodes: {nodes} {text!r} 2 None" in ended.stdout
    assert "refused: " in ended.stdout
    assert "search_width must be" in ended.stdout
    assert "left: []" in ended.stdout
    assert any(line.startswith("plain: ") and len(line) > 8 for line in ended.stdout.splitlines())
