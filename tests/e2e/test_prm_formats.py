"""PRM formats in a real server: each step score of a search equals transformers on the whole solution, float32.

One of each kind: found by its configuration and a chat; given, with a vocabulary of its own; given, whose prompt goes on behind
the solution. tests/prm/test_ranks.py has every format, and test_prm_pool.py and test_faults.py servers with two others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import serving
from tests.e2e.test_prm_parity import scored_paths
from tests.prm.checkpoints import CASES, QUESTION, Case, Reference

pytestmark = pytest.mark.server
TOLERANCE = 1e-4
SERVED = [case for case in CASES if case.format in ("qwen_prm", "math_shepherd", "judge")]

CHAT = {"model": "default", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 512, "search_width": 4}


@pytest.mark.parametrize("case", SERVED, ids=[case.format for case in SERVED])
def test_parity(case: Case, tmp_path: Path, record_property: Any) -> None:
    reference = Reference(case, tmp_path / "prm")
    flags = ["--prm-model-path", str(tmp_path / "prm"), "--prm-format", case.given]
    with serving(tmp_path / "log.txt", flags) as server:
        search = {"algorithm": "rebase", "return_tree": True}
        paths = scored_paths(server.search(QUESTION, 8, search=search))
        in_lines = {"step_delimiter": "\n\n", "max_step_tokens": 24}  # the policy model never writes an empty line
        paths += scored_paths(server.search(QUESTION, 8, search=search | in_lines))
        status, answer = server.post("/v1/chat/completions", {**CHAT, "search": {"return_tree": True}})
        assert status == 200, answer
        paths += scored_paths(answer)  # the PRM is asked about the last user message
        state = server.search_state()["prm"]
    assert state["format"] == case.format
    assert 0 < state["tokens_extended"] < state["tokens_if_rescored"]
    worst, seen = 0.0, set()
    for path in paths:
        _, scores = reference.step_scores(QUESTION, [node["text"] for node in path])
        worst = max(worst, abs(path[-1]["score"] - scores[-1]))
        seen.add(round(scores[-1], 3))
    print(f"{case.format} {case.architecture}: {len(paths)} steps, largest difference {worst:.1e}")
    record_property("largest_difference", worst)
    assert worst < TOLERANCE
    assert len(seen) > 5
    assert sum("\n" in path[-1]["text"].strip() for path in paths) > 5
