"""Pruned leaves that come back, in the engine: their KV was given back, and is computed again from their tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_ets.core import registry
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.selection import Level, Selection
from sglang_ets.core.tree import Node
from sglang_ets.engine.live import LiveSearch
from sglang_ets.engine.metrics import SearchMetrics
from tests.engine.fakes import DELIMITER, FakeScheduler, ScriptedPrm, World, given, tokens
from tests.engine.test_strands import MODES, asked, grown, tree_of, world_of

PROMPT = "Q: 1+1?\n"
LABELS = {"model_name": "m", "tp_rank": 0}  # of sglang's own metrics
SERIES = {name: str(value) for name, value in LABELS.items()}


class Returner:
    """Prunes all leaves but the first, and at the second level all for the first one that was pruned before."""

    reads = ("pruned",)
    is_cheap = True

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        allocation = np.zeros(level.scores.size, dtype=np.int64)
        assert level.is_pruned is not None
        chosen = np.argmax(level.is_pruned) if level.number == 2 else 0
        allocation[chosen] = level.remaining_width
        return Selection(allocation)


@pytest.fixture(autouse=True, scope="module")
def returner() -> Iterator[None]:
    registry.load("tests.engine.test_revival:Returner")
    yield
    del registry._given["returner"]


def three_distinct_steps(child: Any) -> Sequence[int]:
    """Steps that share nothing, the third with an answer."""
    number = (child.sampling_params.sampling_seed or 0) % 10**6
    is_last = bytes(list(given(child))).count(DELIMITER.encode()) == 3
    return tokens(f"{number} is the answer", ends=True) if is_last else tokens(f"{number:06d} and so on{DELIMITER}")


def num_cached(world: World, live: LiveSearch, node: Node) -> int:
    """Tokens of the node's trajectory, the prompt aside, whose KV the radix cache has."""
    ids = live.req.origin_input_ids + array("q", live.search.tree.trajectory_token_ids(node))
    key = RadixKey(ids, live.req.extra_key, cache_salt=live.req.cache_salt)
    found = world.scheduler.tree_cache.match_prefix(MatchPrefixParams(key=key))
    slots = world.scheduler.tree_cache.path_device_indices(found.last_device_node)
    return len(slots) - live.prompt_tokens


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_what_was_freed_is_computed_again(mode: str, overlaps: bool) -> None:
    continued: set[str] = set()

    def script(child: Any) -> Sequence[int]:
        continued.add(bytes(list(given(child))).decode())
        return three_distinct_steps(child)

    world = world_of(mode, script, overlaps=overlaps)
    asked(world, width=4, algorithm="returner", early_stop="off", max_step_tokens=64)
    live, ticks = world.live(), world.ticks()
    tree = live.search.tree
    while not live.search.num_revived:
        next(ticks)
    (leaf,) = {node.parent for node in tree.nodes[1:] if node.parent is not None and node.level > node.depth}
    hold = live.branches[leaf.id].hold
    assert hold is not None and not hold.locked
    assert num_cached(world, live, leaf) == 0, "its KV was given back when it was pruned"
    for _ in ticks:
        pass
    world.assert_balanced()
    result, nodes = world.answer(), tree_of(world)["nodes"]
    assert (result["search"]["nodes_revived"], result["search"]["warnings"]) == (1, [])
    assert [level["depth"] for level in result["search"]["kv_levels"]] == [1, 2, 3, 4]
    assert PROMPT + leaf.text in continued
    assert world.prm.num_recomputed == 4
    revived = next(node["id"] for node in nodes if node["text"] == leaf.text)
    assert [node["level"] for node in nodes if node["parent"] == revived] == [3] * 4
    assert all(answer["text"].startswith(leaf.text) for answer in result["results"])
    num_again = len(world.scheduler.prefilled) - 1
    if mode != "extend":
        assert num_again == (1 if mode == "shared" else 4), "only what was revived is prefilled"
    assert result["search"]["tokens_computed"] >= len(leaf.token_ids)


@pytest.mark.parametrize("algorithm", ["returner", "subpool"])
def test_trees_are_the_same_in_all_modes(algorithm: str) -> None:
    trees = [
        tree_of(grown(world_of(mode, overlaps=overlaps), width=16, algorithm=algorithm, early_stop="off"))
        for mode in MODES
        for overlaps in (False, True)
    ]
    assert all(tree == trees[0] for tree in trees)
    assert any("level" in node for node in trees[0]["nodes"])


def test_a_stream_says_nothing_that_a_revived_leaf_could_change() -> None:
    world = World(FakeScheduler(three_distinct_steps))
    world.ask(algorithm="returner", stream=True, early_stop="off", n=4)
    world.run()
    world.assert_balanced()
    texts = [report["progress"]["text"] for report in world.scheduler.output_streamer.reports("pa")]
    levels = [report["progress"]["level"] for report in world.scheduler.output_streamer.reports("pa")]
    answers = [answer["text"] for answer in world.answer()["results"]]
    assert levels == [1, 2, 3] and texts[0] == "" and len(answers) == 4
    assert all(answer.startswith(text) for answer in answers for text in texts)


def test_pruning_is_counted_once_and_never_taken_back() -> None:
    world = World(FakeScheduler(three_distinct_steps))
    counted = CollectorRegistry()
    world.ets._metrics = SearchMetrics(LABELS, counted)
    world.ask(algorithm="returner", early_stop="off")
    world.run()
    figures = world.answer()["search"]
    pruned = counted.get_sample_value("sglang_ets_nodes_pruned_total", {"algorithm": "returner", **SERIES})
    assert pruned == figures["nodes_pruned"] + figures["nodes_revived"] == 3 + 4 + 3


def test_a_full_pool_is_survived() -> None:
    """Searches that revive leaves, two at once in a pool that is too small for them."""
    world = World(FakeScheduler(three_distinct_steps, pool_tokens=170), ScriptedPrm())
    for rid in ("one", "two"):
        world.ask(rid, algorithm="subpool", search_width=8, early_stop="off", max_new_tokens=80, max_step_tokens=24)
    world.run()
    figures = [world.answer(rid)["search"] for rid in ("one", "two")]
    assert sum(one["kv_pressure_releases"] for one in figures) > 0
    assert all(one["nodes_revived"] > 0 for one in figures)
    world.assert_balanced()
