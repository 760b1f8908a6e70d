"""A search driven by a scripted policy model and PRM: every algorithm, random ends, failures, limits."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ets.core.answer import rank
from sglang_ets.core.config import Algorithm, SearchConfig
from sglang_ets.core.ilp import CostTree
from sglang_ets.core.search import Action, Complete, Expand, Finish, Measure, Prune, Score, Search, Select
from sglang_ets.core.selection import get_policy

ALGORITHMS = get_args(Algorithm)
PROMPT_TOKENS = 5


@dataclass
class Driver:
    """Plays the engine: steps, scores and failures come from one seeded stream."""

    config: SearchConfig
    seed: int
    failure_rate: float = 0.0
    stop_rate: float = 0.2
    log: list[Action] = field(default_factory=list)
    widths: list[tuple[int, int]] = field(default_factory=list)  # allocated, remaining
    ended: set[int] = field(default_factory=set)  # pruned or complete

    def run(self, max_actions: int = 10_000) -> Search:
        self.draw = np.random.default_rng(self.seed)
        self.search = Search(self.config, PROMPT_TOKENS)
        waiting = deque(self.search.start())
        while waiting:
            action = waiting.popleft()
            self.log.append(action)
            assert len(self.log) < max_actions, "a search must end"
            waiting.extend(self._answer(action))
            self.search.tree.check()
        return self.search

    def _answer(self, action: Action) -> list[Action]:
        if isinstance(action, Expand):
            assert action.max_new_tokens >= 1
            return [new for node_id in action.node_ids for new in self._step(node_id, action.max_new_tokens)]
        if isinstance(action, Score):
            has_grown = self.search.tree.nodes[action.node_id].state == "retained"  # the engine ends such a search
            if not has_grown and self.draw.random() < self.failure_rate / 2:
                return self.search.on_failed(action.node_id, "no score")
            return self.search.on_scored(
                action.node_id, float(self.draw.random()), self.draw.random(4).astype(np.float32)
            )
        if isinstance(action, Select):
            return self._select(action)
        if isinstance(action, Prune | Complete):
            ids = action.node_ids if isinstance(action, Prune) else (action.node_id,)
            assert self.ended.isdisjoint(ids), "a node ends once"
            self.ended |= set(ids)
        return []

    def _step(self, node_id: int, room: int) -> list[Action]:
        if self.draw.random() < self.failure_rate:
            return self.search.on_failed(node_id, "aborted")
        length = int(self.draw.integers(1, min(room, 6) + 1))
        finish = "stop" if self.draw.random() < self.stop_rate else "length" if length == room else "step"
        ids = self.draw.integers(0, 50, length).tolist()
        return self.search.on_step(node_id, ids, " ".join(map(str, ids)), finish)  # type: ignore[arg-type]

    def _select(self, action: Select) -> list[Action]:
        num = len(action.leaf_ids)
        kv = CostTree(np.full(num, -1), np.ones(num), np.arange(num))
        level = self.search.level(kv)
        selection = get_policy(self.config.algorithm).select(level, self.config)
        self.widths.append((int(selection.allocation.sum()), self.search.remaining_width))
        return self.search.on_selected(selection)


def config_of(algorithm: str, width: int = 8, **fields: Any) -> SearchConfig:
    return SearchConfig(algorithm=algorithm, width=width, max_tokens=40, max_steps=6, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(deadline=None, max_examples=25)
@given(width=st.integers(2, 40), seed=st.integers(0, 10_000), failure_rate=st.sampled_from([0.0, 0.1, 0.6]))
def test_every_search_ends_soundly(algorithm: str, width: int, seed: int, failure_rate: float) -> None:
    driver = Driver(config_of(algorithm, width), seed, failure_rate)
    search = driver.run()
    assert [type(action) for action in driver.log].count(Finish) == 1
    assert all(allocated == remaining for allocated, remaining in driver.widths), "the width is shared out exactly"
    complete = search.tree.complete()
    assert len(complete) <= width
    assert {node.id for node in search.tree.nodes if node.state in ("pruned", "complete")} == driver.ended
    for node in search.tree.nodes:
        if node.state in ("retained", "pruned", "complete") and node.parent is not None:
            assert node.parent.state == "retained"
        assert node.trajectory_tokens <= search.config.max_tokens
        assert node.depth <= search.config.max_steps
    if failure_rate == 0.0:
        assert len(complete) == width
        assert driver.log[-1] == Finish("complete")


@pytest.mark.parametrize("kv_cost", ["tokens", "nodes"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_level_has_what_its_policy_reads(algorithm: str, kv_cost: str) -> None:
    search = Search(config_of(algorithm, 4, kv_cost=kv_cost), PROMPT_TOKENS)
    (expand,) = search.start()
    for node_id in expand.node_ids:
        search.on_step(node_id, [7], "7", "step")
        actions = search.on_scored(node_id, 0.5, np.ones(4, dtype=np.float32))
    if algorithm == "best_of_n":
        return  # never asks
    assert [type(action) for action in actions] == [Measure, Select]
    is_solved = algorithm in ("ets", "ets_kv")
    level = search.level(CostTree(np.full(4, -1), np.ones(4), np.arange(4)) if is_solved else None)
    assert (level.kv is not None, level.nodes is not None) == (is_solved, is_solved and kv_cost == "nodes")
    assert (level.embeddings is not None) == (algorithm == "ets")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_events_give_equal_actions(algorithm: str) -> None:
    first, second = (Driver(config_of(algorithm, 16), seed=3, failure_rate=0.1) for _ in range(2))
    first.run()
    second.run()
    assert first.log == second.log


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_levels_are_measured_in_order(algorithm: str) -> None:
    driver = Driver(config_of(algorithm, 8), seed=1)
    driver.run()
    depths = [action.depth for action in driver.log if isinstance(action, Measure)]
    assert depths == list(range(1, len(depths) + 1))
    assert len(depths) >= 2


def test_all_children_failing_is_a_failed_search() -> None:
    driver = Driver(config_of("ets"), seed=0, failure_rate=1.0)
    search = driver.run()
    assert driver.log[-1] == Finish("failed")
    assert search.trajectories() == []


def test_stopping_early_keeps_what_there_is() -> None:
    search = Search(config_of("rebase", 2), PROMPT_TOKENS)
    search.start()
    search.on_step(1, [1, 2], "one two", "step")
    search.on_scored(1, 0.5, np.ones(2, dtype=np.float32))
    assert search.stop("deadline") == [Finish("deadline")]
    (kept,) = search.trajectories()
    assert (kept.text, kept.finish_reason) == ("one two", "length")
    assert search.on_step(2, [3], "three", "step") == []
    assert search.stop("deadline") == []


def test_a_budget_that_nothing_fits_ends_the_search() -> None:
    driver = Driver(config_of("ets", kv_budget_tokens=1), seed=0, stop_rate=0.0)
    search = driver.run()
    assert driver.log[-1] == Finish("kv_budget")
    assert len(search.trajectories()) == 8


def test_dvts_keeps_one_leaf_of_each_subtree() -> None:
    driver = Driver(config_of("dvts", 16), seed=5, stop_rate=0.0)
    search = driver.run()
    retained = [node for node in search.tree.nodes if node.depth == 1 and node.state == "retained"]
    assert sorted(node.subtree for node in retained) == [0, 1, 2, 3]


def test_best_of_n_grows_every_trajectory_alone() -> None:
    driver = Driver(config_of("best_of_n", 6), seed=2)
    search = driver.run()
    assert not any(isinstance(action, Select | Prune) for action in driver.log)
    assert len(search.tree.complete()) == 6
    assert all(len(action.node_ids) == 1 for action in driver.log[1:] if isinstance(action, Expand))


@pytest.mark.parametrize("rule", ["best", "majority", "weighted_majority"])
def test_trajectories_can_be_ranked(rule: str) -> None:
    config = config_of("ets", 8, answer=rule, answer_pattern=r"(\d+)$", num_results=4)
    driver = Driver(config, seed=4)
    ranked = rank(driver.run().trajectories(), config)
    assert len(ranked) == 8
    if rule == "best":
        scores = [answer.score for answer in ranked]
        assert scores == sorted(scores, reverse=True)
