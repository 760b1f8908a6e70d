"""The attention of a GPU, rehearsed on the CPU: Triton's interpreter runs sglang's kernels and ours behind a whole search.

Slow, so the searches are small. A short prompt is decoded by sglang's Triton backend alone; a long one shares enough KV for
the kernels of `ets_tree`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.serving import PROBLEMS, Server, serving

pytestmark = pytest.mark.server

SHORT = PROBLEMS[0]["prompt"]
LONG = "1+1=2\n" * 40 + SHORT
FLAGS = ("--attention-backend", "ets_tree", "--max-total-tokens", "4000", "--prm-max-total-tokens", "4000")
SHARED = "the first decode that shares KV"
SCORE_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("triton") / "log.txt"
    with serving(log, ["--search", "ets", *FLAGS], env={"TRITON_INTERPRET": "1"}) as running:
        yield running


def nodes_of(server: Server, prompt: str) -> tuple[list[Any], list[float]]:
    """What a search of width 2 and two short levels grew: places, tokens and states of its steps; and their scores."""
    settings = {"max_steps": 2, "max_step_tokens": 5, "return_tree": True}
    answer = server.search(prompt, 2, max_tokens=10, seed=3, search=settings)
    assert answer["search"]["nodes_failed"] == 0
    nodes = answer["search"]["tree"]["nodes"]
    assert len(nodes) == 4
    scores = [node["score"] for node in nodes if node["score"] is not None]
    return [(node["id"], node["parent"], node["token_ids"], node["state"]) for node in nodes], scores


def log_of(server: Server) -> str:
    return server.log.read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize(("prompt", "is_shared"), [(SHORT, False), (LONG, True)], ids=["short", "long"])
def test_a_search_grows_the_same_tree_as_with_torch(
    interpreted: Server, server: Server, prompt: str, is_shared: bool
) -> None:
    nodes, scores = nodes_of(interpreted, prompt)
    expected_nodes, expected_scores = nodes_of(server, prompt)
    assert nodes == expected_nodes
    assert scores == pytest.approx(expected_scores, abs=SCORE_TOLERANCE)
    assert (SHARED in log_of(interpreted)) is is_shared
    state = interpreted.wait_until_no_search()
    assert (state["live"], state["held_kv_tokens"], state["locks"], state["prm"]["locks"]) == (0, 0, 0, 0)
