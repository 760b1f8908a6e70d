"""A search driven by a scripted policy model and PRM: every algorithm, random ends, failures, limits."""

from __future__ import annotations

import random
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ets.core.answer import rank
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import CostTree
from sglang_ets.core.registry import BUILT_IN
from sglang_ets.core.search import Action, Complete, Expand, Finish, Measure, Prune, Score, Search, Select
from sglang_ets.core.selection import Selection, checked
from sglang_ets.core.stopping import EarlyEnd
from sglang_ets.core.tree import StepFinish

ALGORITHMS = tuple(BUILT_IN)
REVIVING = ("subpool",)  # those whose pruned leaves come back
PROMPT_TOKENS = 5


@dataclass
class Driver:
    """Plays the engine: steps, scores and failures come from one seeded stream."""

    config: SearchConfig
    seed: int
    failure_rate: float = 0.0
    stop_rate: float = 0.2
    num_tokens: int = 50  # different ones; a few make trajectories agree
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
            assert 1 <= action.max_new_tokens <= self.config.max_step_tokens
            self.ended.discard(action.parent_id)  # a pruned leaf may be revived
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
        length = int(self.draw.integers(1, room + 1))
        finish = "stop" if self.draw.random() < self.stop_rate else "length" if length == room else "step"
        ids = self.draw.integers(0, self.num_tokens, length).tolist()
        return self.search.on_step(node_id, ids, " ".join(map(str, ids)), finish)  # type: ignore[arg-type]

    def _select(self, action: Select) -> list[Action]:
        num = len(action.leaf_ids)
        kv = apart(num)
        level = self.search.level(kv)
        selection = self.config.policy.select(level, self.config)
        checked(selection, level, self.config.algorithm)
        self.widths.append((int(selection.allocation.sum()), self.search.remaining_width))
        return self.search.on_selected(selection)


def apart(num: int) -> CostTree:
    """Leaves that share nothing."""
    return CostTree(np.full(num, -1), np.ones(num), np.arange(num))


def config_of(algorithm: str, width: int = 8, **fields: Any) -> SearchConfig:
    """Either limit ends some trajectories: of 14 tokens, or of 6 steps of 1 to 6 tokens."""
    limits = {"max_tokens": 14, "max_step_tokens": 6, "max_steps": 6}
    return SearchConfig(algorithm=algorithm, width=width, **{**limits, **fields})  # type: ignore[arg-type]


def grow(search: Search, expand: Action, tokens: int = 1, finish: StepFinish = "step") -> list[Action]:
    """Play one expansion: all children get steps of `tokens` tokens, equal scores and embeddings (1, node id)."""
    assert isinstance(expand, Expand)
    actions = []
    for node_id in expand.node_ids:
        search.on_step(node_id, range(tokens), f"{node_id} ", finish)
        actions += search.on_scored(node_id, 0.5, np.array([1, node_id], dtype=np.float32))
    return actions


def selected(search: Search, *allocation: int, clusters: list[int] | None = None) -> list[Action]:
    """Let selection decide so; `level` is asked for as the engine does."""
    search.level(apart(len(allocation)))
    labels = None if clusters is None else np.array(clusters)
    return search.on_selected(Selection(np.array(allocation), labels))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=25)
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
        is_full = node.trajectory_tokens == search.config.max_tokens or node.depth == search.config.max_steps
        assert not (is_full and node.state == "retained"), "a trajectory at its limit does not go on"
    num_levels = sum(isinstance(action, Measure) for action in driver.log)
    assert num_levels < (2 if algorithm in REVIVING else 1) * search.config.max_steps + 1
    assert algorithm in REVIVING or all(node.level == node.depth for node in search.tree.nodes)
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
    has_clusters = algorithm in ("ets", "dora")
    level = search.level(apart(4) if is_solved else None)
    assert (level.kv is not None, level.nodes is not None) == (is_solved, is_solved and kv_cost == "nodes")
    assert (level.embeddings is not None) == has_clusters
    assert (level.depth, level.texts, level.path_scores) == (1, ("7",) * 4, ((0.5,),) * 4)
    assert level.parents is not None and level.parents.tolist() == [0] * 4
    assert (level.number, level.is_pruned is None) == ((1, False) if algorithm in REVIVING else (None, True))
    assert level.rng().random() == np.random.default_rng((search.config.seed, 1)).random()


def test_a_step_has_the_room_that_both_limits_leave() -> None:
    search = Search(config_of("ets", 2, max_tokens=10, max_step_tokens=4), PROMPT_TOKENS)
    (expand,) = search.start()
    rooms = []
    for step in (4, 4):
        rooms.append(expand.max_new_tokens)
        _, _ = grow(search, expand, step)
        expand = selected(search, 2, 0)[-1]
    assert [*rooms, expand.max_new_tokens] == [4, 4, 2]


@pytest.mark.parametrize("limits", [{"max_tokens": 4}, {"max_steps": 1}])
def test_a_trajectory_at_its_limit_is_complete_and_says_that_it_was_cut(limits: dict[str, int]) -> None:
    search = Search(config_of("ets", 2, **limits), PROMPT_TOKENS)
    (expand,) = search.start()
    assert grow(search, expand, 4) == [Measure(1), Complete(1), Complete(2), Finish("complete")]
    assert [one.finish_reason for one in search.trajectories()] == ["length", "length"]
    ended = Search(config_of("ets", 2, **limits), PROMPT_TOKENS)
    (expand,) = ended.start()
    grow(ended, expand, 4, "stop")
    assert [one.finish_reason for one in ended.trajectories()] == ["stop", "stop"]


@pytest.mark.parametrize("finish", ["step", "stop", "length"])
@pytest.mark.parametrize("algorithm", ["rebase", "best_of_n"])
def test_a_last_step_is_known_before_it_is_in_the_tree(algorithm: str, finish: StepFinish) -> None:
    for tokens in range(1, 5):
        for steps in (1, 2):
            limits = {"max_tokens": 4, "max_steps": steps, "max_step_tokens": 4}
            search = Search(config_of(algorithm, 2, early_stop="off", **limits), PROMPT_TOKENS)
            search.start()
            expected = search.is_last_step(1, tokens, finish)
            search.on_step(1, range(tokens), "x", finish)
            search.on_step(2, [1], "x", "stop")
            for node_id in (1, 2):
                search.on_scored(node_id, 0.5, None)
            assert (search.tree.nodes[1].state == "complete") is expected
            assert expected is (finish == "stop" or tokens == 4 or steps == 1)
    with pytest.raises(ValueError, match="no step"):
        search.is_last_step(0, 1, "step")


@pytest.mark.parametrize("rule", ["best", "majority", "weighted_majority"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=25)
@given(
    aggregation=st.sampled_from(["last", "min", "mean", "prod"]), width=st.integers(2, 20), seed=st.integers(0, 10_000)
)
def test_settled_searches_have_the_answer_of_whole_ones(
    algorithm: str, rule: str, aggregation: str, width: int, seed: int
) -> None:
    made = {}
    for early_stop in ("off", "settled"):
        config = config_of(
            algorithm,
            width,
            answer=rule,
            score_aggregation=aggregation,
            answer_pattern="last_number",
            early_stop=early_stop,
        )
        search = Driver(config, seed, stop_rate=0.3, num_tokens=2).run()
        made[early_stop] = (rank(search.trajectories(), config)[0], search)
    (whole, full), (early, short) = made["off"], made["settled"]
    assert (early.score if rule == "best" else early.answer) == (whole.score if rule == "best" else whole.answer)
    assert full.early_end is None
    if short.early_end is not None:
        assert len(short.tree.nodes) <= len(full.tree.nodes)
        assert short.early_end.trajectories_saved == len(full.tree.complete()) - len(short.tree.complete())


def test_an_early_end_reports_what_it_saved() -> None:
    config = config_of("rebase", 4, answer="majority", answer_pattern="last_number", max_step_tokens=3)
    search = Search(config, PROMPT_TOKENS)
    (expand,) = search.start()
    for node_id, finish in zip(expand.node_ids, ("stop", "stop", "stop", "step"), strict=True):
        search.on_step(node_id, range(2), "7 ", finish)  # type: ignore[arg-type]
        actions = search.on_scored(node_id, 0.5, None)
    assert actions == [Measure(1), Complete(1), Complete(2), Complete(3), Finish("settled")]
    assert search.early_end == EarlyEnd("settled", trajectories_saved=1, levels_saved=1, tokens_saved=2)


def test_an_expression_of_a_client_is_not_run_on_the_way() -> None:
    config = config_of("rebase", 8, answer="majority", answer_pattern=r"(\d+)")
    assert Driver(config, seed=0, num_tokens=1).run().early_end is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=25)
@given(width=st.integers(2, 30), budget=st.integers(1, 400), seed=st.integers(0, 10_000))
def test_a_token_budget_holds_and_its_search_still_answers(algorithm: str, width: int, budget: int, seed: int) -> None:
    driver = Driver(config_of(algorithm, width, max_total_tokens=budget, early_stop="off"), seed)
    search = driver.run()
    assert sum(len(node.token_ids) for node in search.tree.nodes) <= budget
    assert search.trajectories()
    assert all(allocated == remaining for allocated, remaining in driver.widths)
    given_up = search.num_given_up + sum(node.finish == "length" for node in search.tree.complete())
    assert len(search.tree.complete()) + search.num_given_up == width
    assert given_up or len(search.tree.complete()) == width


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_budget_that_suffices_changes_nothing(algorithm: str) -> None:
    enough = 16 * 14 * (8 if algorithm in REVIVING else 1)
    plain, ample = (Driver(config_of(algorithm, 16, max_total_tokens=limit), seed=3) for limit in (None, enough))
    plain.run()
    ample.run()
    assert plain.log == ample.log


def test_a_search_narrows_as_its_budget_runs_out() -> None:
    search = Search(config_of("rebase", 8, max_total_tokens=60, max_step_tokens=6, early_stop="off"), PROMPT_TOKENS)
    (expand,) = search.start()
    grow(search, expand, 5)  # 40 of 60 tokens: each of the leaves is expected to need 9 more, up to its 14
    assert search.remaining_width == 2
    assert [action.max_new_tokens for action in selected(search, 2, *[0] * 7)[1:]] == [6]
    assert search.num_given_up == 6


def test_what_selection_decided_stands_in_the_tree() -> None:
    search = Search(config_of("ets", 3), PROMPT_TOKENS)
    (expand,) = search.start()
    grow(search, expand)
    assert selected(search, 2, 0, 1, clusters=[0, 1, 0]) == [Prune((2,)), Expand(1, (4, 5), 6), Expand(3, (6,), 6)]
    nodes = search.tree.nodes[1:4]
    assert [(node.cluster, node.allocation, node.state) for node in nodes] == [
        (0, 2, "retained"),
        (1, 0, "pruned"),
        (0, 1, "retained"),
    ]
    assert search.tree.nodes[4].cluster is None


@pytest.mark.parametrize("center", [True, False])
def test_embeddings_are_centered_if_the_config_says_so(center: bool) -> None:
    search = Search(config_of("ets", 3, center_embeddings=center), PROMPT_TOKENS)
    (expand,) = search.start()
    grow(search, expand)
    level = search.level(apart(3))
    assert level.embeddings is not None
    assert level.embeddings.tolist() == ([[0, -1], [0, 0], [0, 1]] if center else [[1, 1], [1, 2], [1, 3]])


@pytest.mark.parametrize("keep", [True, False])
def test_embeddings_are_forgotten_with_their_level_unless_the_client_wants_them(keep: bool) -> None:
    search = Search(config_of("ets", 3, return_tree=True, return_embeddings=keep), PROMPT_TOKENS)
    (expand,) = search.start()
    search.on_step(1, [7], "1 ", "stop")  # complete: it is in no selection
    search.on_scored(1, 0.5, np.ones(2, dtype=np.float32))
    grow(search, Expand(0, expand.node_ids[1:], 6))
    assert [search.tree.nodes[node_id].embedding is not None for node_id in (2, 3)] == [True, True]
    selected(search, 2, 0)
    assert [node.embedding is not None for node in search.tree.nodes[1:4]] == [keep] * 3


def test_costs_in_nodes_are_the_tree_above_the_leaves() -> None:
    search = Search(config_of("ets", 3, kv_cost="nodes"), PROMPT_TOKENS)
    (expand,) = search.start()
    grow(search, expand)
    for child in selected(search, 0, 2, 1)[1:]:
        grow(search, child)
    nodes = search.level(apart(3)).nodes
    assert nodes is not None
    # nodes 2 and 3 of the first level, without the pruned one; then 4 and 5 under 2, and 6 under 3
    assert nodes.parent.tolist() == [-1, -1, 0, 0, 1]
    assert nodes.cost.tolist() == [1, 1, 1, 1, 1]
    assert nodes.leaf.tolist() == [2, 3, 4]


def test_growth_is_what_the_remaining_width_may_add() -> None:
    search = Search(config_of("ets", 4), PROMPT_TOKENS)
    (expand,) = search.start()
    for node_id, length in zip(expand.node_ids, (5, 1, 2, 6), strict=True):
        search.on_step(node_id, range(length), "", "stop" if node_id == 1 else "step")
        search.on_scored(node_id, 0.5, np.ones(2, dtype=np.float32))
    level = search.level(apart(3))
    assert (level.remaining_width, level.growth_tokens) == (3, 3 * (1 + 2 + 6) / 3)


def test_the_first_level_is_dealt_out_to_the_subtrees_in_turn() -> None:
    search = Search(config_of("dvts", 10), PROMPT_TOKENS)
    search.start()
    assert [node.subtree for node in search.tree.nodes[1:]] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


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
    levels = [action.level for action in driver.log if isinstance(action, Measure)]
    assert levels == list(range(1, len(levels) + 1))
    assert len(levels) >= 2


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


@pytest.mark.parametrize(("early_stop", "most"), [("off", 1.2), ("settled", 4.0)])  # settled or not, each vote is seen
def test_a_step_of_best_of_n_costs_the_same_however_wide_its_search_is(early_stop: str, most: float) -> None:
    calls_per_step = []
    for width in (16, 256):
        search, draw, num_calls = Search(config_of("best_of_n", width, early_stop=early_stop), 5), random.Random(0), [0]

        def count(_frame: Any, event: str, _argument: Any, num_calls: list[int] = num_calls) -> None:
            num_calls[0] += event == "call"

        waiting = deque(search.start())
        sys.setprofile(count)
        while waiting:
            match waiting.popleft():
                case Expand(node_ids=node_ids):
                    for node_id in node_ids:
                        waiting += search.on_step(node_id, [1], "1 ", "stop" if draw.random() < 0.2 else "step")
                case Score(node_id):
                    waiting += search.on_scored(node_id, draw.random(), None)
        sys.setprofile(None)
        calls_per_step.append(num_calls[0] / len(search.tree.nodes))
    assert calls_per_step[1] < most * calls_per_step[0]


def test_trajectories_of_best_of_n_come_by_place_whichever_was_complete_first() -> None:
    search = Search(config_of("best_of_n", 3, max_steps=1), PROMPT_TOKENS)
    search.start()
    for node_id in (3, 1, 2):
        search.on_step(node_id, [node_id], f"{node_id}", "stop")
        search.on_scored(node_id, 0.5, None)
    assert [one.text for one in search.trajectories()] == ["1", "2", "3"]


@pytest.mark.parametrize("rule", ["best", "majority", "weighted_majority"])
def test_trajectories_can_be_ranked(rule: str) -> None:
    config = config_of("ets", 8, answer=rule, answer_pattern=r"(\d+)$", num_results=4)
    driver = Driver(config, seed=4)
    ranked = rank(driver.run().trajectories(), config)
    assert len(ranked) == 8
    if rule == "best":
        scores = [answer.score for answer in ranked]
        assert scores == sorted(scores, reverse=True)
