"""Forks and shared decoding on a real model: one prefill a search, no token computed twice, and the trees of a row per node."""

from __future__ import annotations

from typing import Any

import pytest

from bench.trees import growth, num_distinct_prefixes
from sglang_ets.core.registry import BUILT_IN
from tests.e2e.serving import OVERLAPS, PROBLEMS, Server

pytestmark = pytest.mark.server

WIDTH = 16


def num_prefills(server: Server) -> int:
    return server.log.read_text(encoding="utf-8", errors="replace").count("Prefill batch")


@pytest.mark.parametrize("algorithm", BUILT_IN)
def test_a_search_prefills_its_prompt_and_computes_no_token_twice(server: Server, algorithm: str) -> None:
    before = num_prefills(server)
    answer = server.search(
        PROBLEMS[3]["prompt"], WIDTH, max_tokens=128, seed=4, search={"algorithm": algorithm, "return_tree": True}
    )
    assert num_prefills(server) - before == 1
    figures = answer["search"]
    assert figures["forks"] == "shared"
    distinct = num_distinct_prefixes(figures["tree"]["nodes"])
    assert figures["tokens_computed"] <= 1.05 * distinct < 1.05 * answer["usage"]["completion_tokens"]


def test_a_search_with_a_penalty_is_extended_and_says_so(server: Server) -> None:
    answer = server.search(PROBLEMS[3]["prompt"], 4, max_tokens=64, frequency_penalty=0.5)
    assert answer["search"]["forks"] == "extend"


@pytest.mark.parametrize("algorithm", ["rebase", "ets", "dvts"])
def test_a_tree_is_the_same_though_steps_begin_before_selection(server: Server, algorithm: str) -> None:
    def grown(**settings: object) -> dict[str, Any]:
        search = {"algorithm": algorithm, "return_tree": True, "early_stop": "off", **settings}
        return server.search(PROBLEMS[4]["prompt"], WIDTH, max_tokens=128, seed=4, temperature=1.0, search=search)

    waiting, ahead = grown(), grown(speculate=True)
    assert growth(ahead["search"]["tree"]["nodes"]) == growth(waiting["search"]["tree"]["nodes"])
    assert ahead["choices"][0]["text"] == waiting["choices"][0]["text"]
    assert ahead["usage"] == waiting["usage"]
    for early, late in zip(ahead["search"]["kv_levels"], waiting["search"]["kv_levels"], strict=True):
        for name, value in late.items():  # with the overlap schedule the last token of a step may have its KV, or not
            has_more = OVERLAPS and name in ("held", "retained")
            assert early[name] == pytest.approx(value, abs=late["leaves"] * has_more), name
    assert waiting["search"]["speculation"] is None
    told = ahead["search"]["speculation"]
    assert 0 < told["children_used"] <= told["children"]
    assert told["tokens_wasted"] < ahead["search"]["tokens_computed"]
    state = server.wait_until_no_search()
    assert (state["live"], state["held_kv_tokens"], state["locks"]) == (0, 0, 0), state
