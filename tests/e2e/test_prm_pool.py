"""Small PRM pools on a real server: no step fails for want of KV, what cannot fit is refused, nothing is left locked."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import PROBLEMS, Server, serving
from tests.prm.conftest import MODELS, changed_config

pytestmark = pytest.mark.server

PROMPTS = [problem["prompt"] for problem in PROBLEMS[:4]]
OUT_OF_BALANCE = ("out of balance", " locks on ", "the PRM failed")


def search(server: Server, prompt: str, width: int, algorithm: str, **fields: Any) -> tuple[int, Any]:
    body = {"model": "default", "prompt": prompt, "max_tokens": 256, "seed": 1, "search_width": width, **fields}
    return server.post("/v1/completions", {**body, "search": {"algorithm": algorithm}})


def failed_steps(answer: Any) -> int:
    return int(answer["search"]["nodes_failed"])


def assert_sound(server: Server) -> dict[str, Any]:
    """Nothing is held, and no account was out of balance when the last search ended; returns the PRM's figures."""
    state = server.wait_until_no_search()
    assert state["live"] == 0
    assert (state["locks"], state["prm"]["locks"], state["prm"]["held_kv_tokens"]) == (0, 0, 0)
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert not [words for words in OUT_OF_BALANCE if words in log]
    return dict(state["prm"])


def test_four_searches_at_once_share_a_pool_of_2000_tokens(tmp_path: Path) -> None:
    with serving(tmp_path / "log.txt", ["--prm-max-total-tokens", "2000"]) as server:
        with ThreadPoolExecutor(4) as clients:
            algorithms = ("ets", "rebase", "dvts", "beam")
            answers = list(clients.map(lambda at: search(server, PROMPTS[at], 64, algorithms[at]), range(4)))
        assert [status for status, _ in answers] == [200] * 4, answers
        assert [failed_steps(answer) for _, answer in answers] == [0] * 4
        state = assert_sound(server)
        assert state["pool_tokens"] == 2000
        assert state["locks_given_up"] > 0
        assert "gives up paths" in server.log.read_text(encoding="utf-8", errors="replace")


def test_a_pool_of_one_trajectory_serves_every_width(strict: Server) -> None:
    for algorithm, width in (("ets", 16), ("rebase", 32), ("best_of_n", 16)):
        status, answer = search(strict, PROMPTS[0], width, algorithm, max_tokens=512)
        assert status == 200, answer
        assert failed_steps(answer) == 0
    assert assert_sound(strict)["locks_given_up"] > 0
    status, answer = search(strict, PROMPTS[0], 4, "ets", max_tokens=600)
    assert status == 400
    assert "for the PRM, whose KV pool takes 599; lower max_tokens or raise --prm-max-total-tokens" in str(answer)


def test_a_context_that_is_too_short_is_refused_at_admission(tmp_path: Path) -> None:
    shutil.copytree(MODELS / "prm", tmp_path / "prm")
    with (
        changed_config(tmp_path / "prm", max_position_embeddings=160),
        serving(tmp_path / "log.txt", ["--prm-model-path", str(tmp_path / "prm")]) as server,
    ):
        status, answer = search(server, PROMPTS[0], 8, "ets")
        assert status == 400
        assert "whose context is 160; lower max_tokens or shorten the prompt" in str(answer)
        for algorithm in ("ets", "best_of_n"):
            status, answer = search(server, PROMPTS[0], 8, algorithm, max_tokens=100)
            assert status == 200, answer
            assert failed_steps(answer) == 0
        assert assert_sound(server)["context_tokens"] == 160
