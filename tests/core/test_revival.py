"""Pruned leaves that come back: what a level shows of them, what their revival does, and the rule of `subpool`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ets.core import registry
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.kv_costs import token_costs
from sglang_ets.core.search import Action, Expand, Finish, Measure, Prune, Search, Select
from sglang_ets.core.selection import Level, Selection
from sglang_ets.core.subpool import Subpool
from sglang_ets.testing import levels_of, replay
from tests.core.test_search import PROMPT_TOKENS, Driver, config_of, grow, selected
from tests.core.test_selection import level_of

PER_WIDTH = 2


class Wanderer:
    """Shares the width out at random over all leaves."""

    reads = ("pruned", "costs")
    pruned_per_width = PER_WIDTH

    def select(self, level: Level, _config: SearchConfig) -> Selection:
        odds = np.full(level.scores.size, 1.0 / level.scores.size)
        return Selection(level.rng().multinomial(level.remaining_width, odds).astype(np.int64))


@pytest.fixture(autouse=True, scope="module")
def wanderer() -> Iterator[None]:
    registry.load("tests.core.test_revival:Wanderer")
    yield
    del registry._given["wanderer"]


class Watcher(Driver):
    """Checks each level against the tree and keeps what it was shown."""

    def run(self, max_actions: int = 10_000) -> Search:
        self.levels: list[Level] = []
        self.asked: list[tuple[int, ...]] = []
        self.shown: set[int] = set()  # pruned leaves of the last level that did not go on, or were pruned in it
        return super().run(max_actions)

    def _select(self, action: Select) -> list[Action]:
        tree, config = self.search.tree, self.config
        leaves = [tree.nodes[leaf_id] for leaf_id in action.leaf_ids]
        level = self.search.level(token_costs([tree.trajectory_token_ids(leaf) for leaf in leaves]))
        num_own = sum(leaf.state == "open" for leaf in leaves)
        own, pruned = leaves[:num_own], leaves[num_own:]
        assert level.is_pruned is not None and level.is_pruned.tolist() == [False] * num_own + [True] * len(pruned)
        assert [tree.by_place(part) for part in (own, pruned)] == [own, pruned]
        assert own == tree.by_place(n for n in tree.nodes if n.state == "open"), "all unfinished leaves are asked about"
        assert all(leaf.state == "pruned" and leaf.id in self.shown for leaf in pruned)
        assert len(pruned) == min(len(self.shown), config.num_pruned_shown * (level.number <= config.max_steps))
        left_out = [tree.nodes[node_id].score for node_id in self.shown - {leaf.id for leaf in pruned}]
        assert not pruned or max(left_out, default=0.0) <= min(leaf.score for leaf in pruned), "the best are shown"
        assert level.depths.tolist() == [leaf.depth for leaf in leaves] and level.depth == max(level.depths)
        assert level.costs("tokens").leaf.size == len(leaves)
        self.levels.append(level)
        self.asked.append(action.leaf_ids)
        selection = config.policy.select(level, config)
        self.widths.append((int(selection.allocation.sum()), self.search.remaining_width))
        actions = self.search.on_selected(selection)
        for leaf, count in zip(leaves, selection.allocation.tolist(), strict=True):
            assert (leaf.state, leaf.allocation, leaf.num_children) == ("retained" if count else "pruned", count, count)
        self.shown = {leaf.id for leaf in leaves if leaf.state == "pruned"}
        newly = [leaf.id for leaf in own if leaf.state == "pruned"]
        assert [action.node_ids for action in actions if isinstance(action, Prune)] == ([tuple(newly)] if newly else [])
        return actions


@pytest.mark.parametrize("algorithm", ["wanderer", "subpool"])
@settings(max_examples=50)
@given(width=st.integers(2, 24), seed=st.integers(0, 10_000), failure_rate=st.sampled_from([0.0, 0.1, 0.5]))
def test_searches_that_revive_leaves_end_soundly(algorithm: str, width: int, seed: int, failure_rate: float) -> None:
    config = config_of(algorithm, width, early_stop="off")
    watcher = Watcher(config, seed, failure_rate)
    search = watcher.run()
    assert all(allocated == remaining for allocated, remaining in watcher.widths)
    assert [level.number for level in watcher.levels] == list(range(1, len(watcher.levels) + 1))
    draws = [level.rng().random() for level in watcher.levels]
    assert len(set(draws)) == len(draws), "each level draws anew"
    assert sum(isinstance(action, Measure) for action in watcher.log) < 2 * config.max_steps
    expanded = [action.parent_id for action in watcher.log if isinstance(action, Expand)]
    assert len(set(expanded)) == len(expanded), "a leaf goes on once"
    revived = [n for n in search.tree.nodes[1:] if n.parent is not None and n.level > n.parent.level + 1]
    assert len({n.parent.id for n in revived if n.parent is not None}) == search.num_revived
    if failure_rate == 0.0:
        assert len(search.tree.complete()) == width and watcher.log[-1] == Finish("complete")


def test_leaves_are_revived_at_all() -> None:
    for algorithm in ("wanderer", "subpool"):
        assert Watcher(config_of(algorithm, 16, early_stop="off"), seed=1).run().num_revived > 0


def two_levels(**fields: Any) -> tuple[Search, list[Action]]:
    """A search of width 4 at its second level: of 1 to 4 only 2 went on, to 5 to 8."""
    search = Search(config_of("wanderer", 4, **fields), PROMPT_TOKENS)
    (expand,) = search.start()
    grow(search, expand)
    prune, expand = selected(search, 0, 4, 0, 0)
    assert prune == Prune((1, 3, 4))
    return search, grow(search, expand)


def test_a_revived_leaf_goes_on_at_its_own_depth() -> None:
    search, actions = two_levels()
    assert actions == [Measure(2), Select((5, 6, 7, 8, 1, 3, 4))]
    level = search.level(None)
    assert (level.number, level.depth, level.depths.tolist()) == (2, 2, [2, 2, 2, 2, 1, 1, 1])
    assert search.on_selected(Selection(np.array([0, 1, 0, 0, 0, 3, 0]))) == [
        Prune((5, 7, 8)),
        Expand(6, (9,), 6),
        Expand(3, (10, 11, 12), 6),
    ]
    nodes = search.tree.nodes
    assert [(node.depth, node.level, node.index) for node in nodes[9:]] == [(3, 3, 0), (2, 3, 0), (2, 3, 1), (2, 3, 2)]
    assert (nodes[3].state, nodes[3].allocation, search.num_revived) == ("retained", 3, 1)
    assert [node.id for node in search.revivable] == [1, 4, 5, 7, 8]
    plain = {node["id"]: node for node in search.tree.to_dict()["nodes"]}
    assert [one.get("level") for one in plain.values() if one["parent"] == 3] == [3, 3, 3]
    assert all("level" not in one for one in plain.values() if one["parent"] != 3)


def test_a_level_that_is_lost_goes_on_from_what_was_pruned() -> None:
    search = Search(config_of("wanderer", 4), PROMPT_TOKENS)
    (expand,) = search.start()
    grow(search, expand)
    _, expand = selected(search, 0, 4, 0, 0)
    assert isinstance(expand, Expand)
    actions = [action for node_id in expand.node_ids for action in search.on_failed(node_id, "lost")]
    assert actions == [Measure(2), Select((1, 3, 4))]
    assert search.level(None).remaining_width == 4


def test_nothing_comes_back_once_there_were_as_many_levels_as_steps_are_allowed() -> None:
    search, _ = two_levels(max_steps=3)
    (expand,) = search.on_selected(Selection(np.array([0, 0, 0, 0, 4, 0, 0])))[1:]
    assert grow(search, expand) == [Measure(3), Select((9, 10, 11, 12, 3, 4, 5, 6, 7, 8))]
    search.on_selected(Selection(np.array([4] + [0] * 9)))
    assert search.revivable == []


def test_an_answer_is_settled_only_against_what_may_be_revived() -> None:
    """By `min`, a trajectory under the pruned leaf of score 0.9 could beat the complete one of 0.8."""
    for pruned_score, reason in ((0.9, None), (0.7, "settled")):
        config = config_of("wanderer", 2, answer="best", score_aggregation="min", answer_pattern="last_number")
        search = Search(config, PROMPT_TOKENS)
        search.start()
        for node_id, score in ((1, 0.8), (2, pruned_score)):
            search.on_step(node_id, [1], "7", "step")
            actions = search.on_scored(node_id, score, None)
        search.on_selected(Selection(np.array([2, 0])))
        for node_id, finish, score in ((3, "stop", 0.8), (4, "step", 0.1)):
            search.on_step(node_id, [1], "7", finish)  # type: ignore[arg-type]
            actions = search.on_scored(node_id, score, None)
        assert isinstance(actions[-1], Finish) == (reason is not None)
        assert (search.early_end.reason if search.early_end else None) == reason


def test_what_does_not_read_pruned_leaves_is_shown_none() -> None:
    search = Search(config_of("rebase", 4), PROMPT_TOKENS)
    (expand,) = search.start()
    grow(search, expand)
    actions = grow(search, selected(search, 0, 4, 0, 0)[-1])
    assert actions == [Measure(2), Select((5, 6, 7, 8))]
    level = search.level(None)
    assert (level.is_pruned, level.number, search.revivable) == (None, None, [])
    assert level.rng().random() == np.random.default_rng((search.config.seed, 2)).random()


def test_embeddings_of_pruned_leaves_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="must be without embeddings where they have pruned"):
        registry.load("tests.core.test_revival:Greedy")


class Greedy(Wanderer):
    reads = ("pruned", "embeddings")  # type: ignore[assignment]


# ---- the rule of subpool ----


@given(
    scores=st.lists(st.integers(0, 30).map(lambda value: value / 30), min_size=1, max_size=40),
    width=st.integers(1, 40),
    subpools=st.none() | st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_the_best_of_each_subpool_goes_on(scores: list[float], width: int, subpools: int | None, seed: int) -> None:
    """The rule once more: cards dealt one after another into piles, of each the best, and equal shares."""
    level = level_of(scores, width, seed=seed, number=3)
    allocation = Subpool(subpools=subpools).select(level, SearchConfig()).allocation
    count = min(width, len(scores), subpools if subpools else int(np.ceil(np.sqrt(width))))
    cards = np.random.default_rng((seed, 3)).permutation(len(scores)).tolist()
    sizes = [len(scores) // count + (pile < len(scores) % count) for pile in range(count)]
    kept = set()
    for size in sizes:
        pile, cards = cards[:size], cards[size:]
        kept.add(max(pile, key=lambda leaf: scores[leaf]))
    assert set(np.flatnonzero(allocation).tolist()) == kept
    shares = allocation[allocation > 0]
    assert allocation.sum() == width and shares.max() - shares.min() <= 1


def test_a_pruned_leaf_passes_by_a_better_one_as_chance_has_it() -> None:
    """Two of two subpools: the second best of four leaves goes on unless it is dealt beside the best, once of three times."""
    passed = 0
    for number in range(1, 601):
        level = level_of([0.9, 0.8, 0.1, 0.1], 2, number=number)
        passed += int(Subpool(subpools=2).select(level, SearchConfig()).allocation[1])
    assert 360 < passed < 440


# ---- replay ----


@pytest.mark.parametrize("algorithm", ["wanderer", "subpool"])
def test_replay_shows_and_decides_what_the_search_did(algorithm: str) -> None:
    config = config_of(algorithm, 8, early_stop="off", seed=5)
    watcher = Watcher(config, seed=2)
    tree = watcher.run().tree
    assert watcher.search.num_revived > 0
    ordered = [node.id for node in tree.by_place(tree.nodes[1:])]
    decisions = list(replay(config.policy, [tree.to_dict()], config))
    assert len(decisions) == len(watcher.levels)
    for decision, level, asked in zip(decisions, watcher.levels, watcher.asked, strict=True):
        assert [ordered[leaf - 1] for leaf in decision.leaf_ids] == list(asked)
        assert decision.level.scores.tolist() == level.scores.tolist()
        assert decision.level.is_pruned.tolist() == level.is_pruned.tolist()
        assert (decision.level.remaining_width, decision.level.number) == (level.remaining_width, level.number)
        assert decision.selection.allocation.tolist() == config.policy.select(level, config).allocation.tolist()
        assert decision.level.costs("tokens").cost.sum() == level.costs("tokens").cost.sum()


def test_a_record_with_revived_leaves_shows_other_policies_its_own_levels() -> None:
    config = config_of("subpool", 8, early_stop="off")
    watcher = Watcher(config, seed=2)
    nodes = watcher.run().tree.to_dict()["nodes"]
    shown = list(levels_of(nodes))
    assert [level.is_pruned for level, _ in shown] == [None] * len(shown)
    assert [level.remaining_width for level, _ in shown] == [level.remaining_width for level in watcher.levels]
