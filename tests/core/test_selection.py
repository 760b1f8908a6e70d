"""The policies: cases worked out by hand, and what must hold for every level."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_ets.core import selection as selection_module
from sglang_ets.core.allocation import rebase_allocation
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import CostTree, SolverFailure
from sglang_ets.core.registry import BUILT_IN
from sglang_ets.core.selection import Level, Selection, num_groups

ALGORITHMS = tuple(BUILT_IN)
SCORES = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=24)


def chains(costs: list[float]) -> CostTree:
    """Leaves that share nothing."""
    num = len(costs)
    return CostTree(np.full(num, -1), np.array(costs), np.arange(num))


def level_of(scores: list[float], width: int, **fields: Any) -> Level:
    num = len(scores)
    defaults: dict[str, Any] = {
        "kv": chains([10.0] * num),
        "nodes": chains([1.0] * num),
        "embeddings": np.eye(num, dtype=np.float32),
        "subtree": np.arange(num),
        "growth_tokens": 0.0,
    }
    return Level(scores=np.array(scores), remaining_width=width, **{**defaults, **fields})


def select(algorithm: str, level: Level, **fields: Any) -> Selection:
    config = SearchConfig(algorithm=algorithm, **fields)  # type: ignore[arg-type]
    return config.policy.select(level, config)


def shares(algorithm: str, level: Level, **fields: Any) -> list[int]:
    return [int(share) for share in select(algorithm, level, **fields).allocation]


@pytest.mark.parametrize(("kv_cost", "missing"), [("tokens", "kv"), ("nodes", "nodes")])
def test_an_integer_program_needs_costs(kv_cost: str, missing: str) -> None:
    level = level_of([0.9, 0.5], 4, **{missing: None})
    with pytest.raises(ValueError, match=f"needs its costs in {kv_cost}, got none"):
        select("ets", level, width=4, kv_cost=kv_cost)
    assert shares("rebase", level, width=4) == shares("rebase", level_of([0.9, 0.5], 4), width=4)


def test_ets_clusters_by_the_distances_it_is_given() -> None:
    level = level_of([0.9, 0.5, 0.4], 4)
    config = SearchConfig(algorithm="ets", width=4)
    apart = config.policy.select(level, config).clusters
    together = config.policy.select(replace(level, distances=lambda embeddings: np.zeros((3, 3))), config).clusters
    assert apart is not None and together is not None
    assert (apart.tolist(), together.tolist()) == ([0, 1, 2], [0, 0, 0])


def test_groups_are_the_rounded_up_root() -> None:
    assert [num_groups(width) for width in (0, 1, 2, 4, 5, 9, 10, 16, 17, 1024)] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 32]


def test_best_of_n_lets_every_leaf_go_on() -> None:
    assert shares("best_of_n", level_of([0.1, 0.9, 0.5], 3)) == [1, 1, 1]


def test_beam_keeps_the_best_root_of_the_width() -> None:
    # 7 left: ceil(sqrt(7)) = 3 leaves, 2 children each, and one more for the best
    assert shares("beam", level_of([0.2, 0.9, 0.5, 0.1, 0.7], 7)) == [0, 3, 2, 0, 2]
    assert shares("beam", level_of([0.4, 0.4, 0.4, 0.4], 4)) == [2, 2, 0, 0], "a tie goes to the first leaves"
    assert shares("beam", level_of([0.3, 0.6], 16)) == [8, 8], "fewer leaves than beams: all of them"


def test_dvts_keeps_the_best_of_each_subtree() -> None:
    level = level_of([0.2, 0.9, 0.8, 0.1, 0.2], 7, subtree=np.array([0, 1, 1, 2, 0]))
    assert shares("dvts", level) == [2, 3, 0, 2, 0], "leaf 0 before its equal, leaf 4"


def test_rebase_shares_by_softmax() -> None:
    # weights e^0, e^-1, e^-2: of 8, shares of 5.32, then 1.46 of 2, then nothing is left
    assert shares("rebase", level_of([0.4, 0.2, 0.0], 8)) == [6, 2, 0]
    assert shares("rebase", level_of([0.4, 0.2, 0.0], 8), rebase_temperature=1e3) == [3, 3, 2]


# Two leaves under one long step of 60 tokens, one leaf alone with 30: rewards .5, .25, .25 of a width of 4.
SHARED = CostTree(np.array([-1, 0, 0, -1]), np.array([60.0, 5.0, 5.0, 30.0]), np.array([1, 2, 3]))
HAND_SCORES = [0.2 * float(np.log(2)), 0.0, 0.0]  # softmax weights 2, 1, 1 at temperature 0.2


def test_ets_kv_pays_for_shared_kv_once() -> None:
    level = level_of(HAND_SCORES, 4, kv=SHARED)
    assert select("rebase", level).allocation.tolist() == [2, 1, 1]
    # at weight 1 keeping {0}: .5 - .65 < 0, {2}: .25 - .3 < 0, {0, 1}: .75 - .7 = .05, all: 1 - 1 = 0
    first = select("ets_kv", level, kv_cost_weight=1.0)
    assert first.allocation.tolist() == [3, 1, 0], "4 again in the ratio 2 to 1, the best rounded up"
    assert first.clusters is None
    assert first.solver is not None
    assert first.solver.objective == pytest.approx(0.05)
    # at weight 2 all sets lose; one leaf must stay: {2} loses least, .25 - .6 = -.35 against {0}: -.8
    assert shares("ets_kv", level, kv_cost_weight=2.0) == [0, 0, 4]
    assert shares("ets_kv", level, kv_cost_weight=0.0) == [2, 1, 1]


def test_ets_pays_for_new_meanings() -> None:
    embeddings = np.array([[1, 0], [1, 0.01], [0, 1]], dtype=np.float32)
    level = level_of(HAND_SCORES, 4, kv=SHARED, embeddings=embeddings)
    # two clusters, {0, 1} and {2}, each worth .5: all three: 1 - 1 + 1 = 1, {0, 1}: .05 + .5
    covered = select("ets", level, kv_cost_weight=1.0, diversity_weight=1.0, coverage="uniform")
    assert covered.clusters is not None
    assert covered.clusters.tolist() == [0, 0, 1]
    assert covered.allocation.tolist() == [2, 1, 1]
    assert covered.solver is not None
    assert covered.solver.objective == pytest.approx(1.0)
    # at weight 2.5 the second leaf is still nearly free, .25 - .125: {0, 1, 2}: 1 - 2.5 + 1 = -.5, {2}: .25 - .75 + .5 = 0
    assert shares("ets", level, kv_cost_weight=2.5, diversity_weight=1.0, coverage="uniform") == [0, 0, 4]


def test_a_meaning_is_worth_the_reward_of_its_leaves() -> None:
    embeddings = np.array([[1, 0], [1, 0.01], [0, 1]], dtype=np.float32)
    level = level_of(HAND_SCORES, 16, kv=chains([10.0, 10.0, 10.0]), embeddings=embeddings)
    # clusters {0, 1} worth .75 and {2} worth .25, a leaf costs .4: {0}: .5 - .4 + .75 = .85, {0, 2}: .75 - .8 + 1
    kept = select("ets", level, kv_cost_weight=1.2, diversity_weight=1.0, coverage="reward")
    assert kept.solver is not None
    assert kept.solver.objective == pytest.approx(0.95)
    assert kept.allocation.tolist() == [12, 0, 4], "3 to 1: the first leaf inherits the width of the second"
    uniform = shares("ets", level, kv_cost_weight=1.2, diversity_weight=1.0, coverage="uniform")
    assert uniform == [11, 0, 5], "2 to 1: each weighs what it weighed"
    # a poor meaning is not kept for its own sake: at weight 2 {0}: .5 - .67 + .75 against {0, 2}: .75 - 1.33 + 1
    assert shares("ets", level, kv_cost_weight=2.0, diversity_weight=1.0, coverage="reward") == [16, 0, 0]


def test_kv_can_be_counted_in_nodes() -> None:
    nodes = CostTree(np.array([-1, 0, 0, -1]), np.ones(4), np.array([1, 2, 3]))
    level = level_of(HAND_SCORES, 4, kv=SHARED, nodes=nodes)
    # at weight 1.8 in nodes: {2}: .25 - .45 = -.2, {0}: .5 - .9 = -.4, {0, 1}: .75 - 1.35 = -.6, all: 1 - 1.8
    assert shares("ets_kv", level, kv_cost="nodes", kv_cost_weight=1.8) == [0, 0, 4]
    # at weight .8: {2}: .05, {0, 1}: .75 - .6 = .15, all: 1 - .8 = .2
    assert shares("ets_kv", level, kv_cost="nodes", kv_cost_weight=0.8) == [2, 1, 1]


def test_a_level_without_embeddings_is_selected_without_coverage() -> None:
    level = level_of(HAND_SCORES, 4, kv=SHARED, embeddings=None)
    selection = select("ets", level, kv_cost_weight=1.0, diversity_weight=1.0)
    assert selection.clusters is None
    assert selection.allocation.tolist() == [3, 1, 0]


def test_the_budget_leaves_room_for_what_the_next_level_adds() -> None:
    level = level_of(HAND_SCORES, 4, kv=SHARED, growth_tokens=20.0)
    # kept KV: {0} 65, {2} 30, {0, 1} 70, {0, 2} 95, all 100 tokens
    for budget, expected in ((120, [2, 1, 1]), (119, [3, 0, 1]), (90, [3, 1, 0]), (89, [4, 0, 0]), (50, [0, 0, 4])):
        assert shares("ets_kv", level, kv_cost_weight=0.0, kv_budget_tokens=budget) == expected, budget
    nothing = select("ets_kv", level, kv_cost_weight=0.0, kv_budget_tokens=49)
    assert nothing.allocation.tolist() == [0, 0, 0]
    assert not nothing.is_fallback


@pytest.mark.parametrize("algorithm", ["ets", "ets_kv"])
def test_a_solver_that_fails_leaves_the_level_to_rebase_and_says_so(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise SolverFailure("HiGHS ended with an error")

    monkeypatch.setattr(selection_module, "solve", fail)
    level = level_of(HAND_SCORES, 4, kv=SHARED)
    selection = select(algorithm, level)
    assert selection.is_fallback
    assert selection.solver is None
    assert selection.allocation.tolist() == select("rebase", level).allocation.tolist()
    clusters = None if selection.clusters is None else selection.clusters.tolist()
    assert clusters == ([0, 1, 2] if algorithm == "ets" else None), "what the leaves mean is known all the same"
    assert not select("rebase", level).is_fallback


def random_level(draw: np.random.Generator, scores: list[float], width: int) -> Level:
    """Leaves under random inner nodes, some at the same node, some at the root; few meanings; ties are common."""
    num, num_inner = len(scores), int(draw.integers(1, 8))
    parent = [int(draw.integers(-1, node)) for node in range(num_inner)]
    ends = []
    for _ in range(num):
        parent.append(int(draw.integers(-1, num_inner)))
        ends.append(len(parent) - 1 if draw.random() < 0.8 else int(draw.integers(-1, len(parent))))
    costs = draw.integers(0, 40, len(parent)).astype(np.float64)
    kv = CostTree(np.array(parent), costs, np.array(ends))
    embeddings = np.eye(4, dtype=np.float32)[draw.integers(0, 4, num)]
    nodes = CostTree(kv.parent, np.ones(len(parent)), kv.leaf)
    growth = float(draw.integers(0, 20))
    groups = draw.integers(0, 5, num)
    return level_of(scores, width, kv=kv, nodes=nodes, embeddings=embeddings, subtree=groups, growth_tokens=growth)


def held_tokens(level: Level, kept: NDArray[np.int64]) -> float:
    assert level.kv is not None
    return float(level.kv.cost[level.kv.held(kept)].sum())


def assert_better_leaves_get_more(
    level: Level, allocation: NDArray[np.int64], clusters: NDArray[np.int64] | None
) -> None:
    """Of retained leaves a better one never gets less, within a cluster where clusters inherit."""
    groups = np.zeros_like(allocation) if clusters is None else clusters
    order = np.argsort(-level.scores, kind="stable")
    for group in np.unique(groups):
        retained = [int(allocation[place]) for place in order if groups[place] == group and allocation[place]]
        assert retained == sorted(retained, reverse=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=60)
@given(scores=SCORES, width=st.integers(1, 64), seed=st.integers(0, 10_000), weight=st.sampled_from([0.0, 1.0, 4.0]))
def test_every_policy_spends_the_whole_width_on_leaves(
    algorithm: str, scores: list[float], width: int, seed: int, weight: float
) -> None:
    level = random_level(np.random.default_rng(seed), scores, width)
    before = [level.scores.copy(), level.kv.cost.copy(), level.subtree.copy()]
    first, second = (select(algorithm, level, kv_cost_weight=weight) for _ in range(2))
    assert first.allocation.shape == level.scores.shape
    assert first.allocation.min() >= 0
    assert first.allocation.sum() == width
    assert first.allocation.tolist() == second.allocation.tolist(), "ties are fixed"
    assert not first.is_fallback
    for old, new in zip(before, [level.scores, level.kv.cost, level.subtree], strict=True):
        assert old.tolist() == new.tolist(), "selection changes nothing"
    if algorithm not in ("particles", "subpool"):  # where chance may cost a leaf one child, or all
        assert_better_leaves_get_more(level, first.allocation, first.clusters)
    if algorithm == "ets":
        published = select(algorithm, level, kv_cost_weight=weight, coverage="uniform")
        assert published.allocation.sum() == width
        assert_better_leaves_get_more(level, published.allocation, None)


@given(
    scores=SCORES, width=st.integers(1, 64), seed=st.integers(0, 10_000), weight=st.sampled_from([0.0, 0.5, 1.0, 4.0])
)
def test_ets_kv_is_ets_without_coverage(scores: list[float], width: int, seed: int, weight: float) -> None:
    level = random_level(np.random.default_rng(seed), scores, width)
    without = select("ets_kv", level, kv_cost_weight=weight)
    zero = select("ets", level, kv_cost_weight=weight, diversity_weight=0.0)
    assert without.allocation.tolist() == zero.allocation.tolist()
    assert without.clusters is None
    assert zero.clusters is None


@given(scores=SCORES, width=st.integers(1, 64), seed=st.integers(0, 10_000), budget=st.integers(1, 300))
def test_a_budget_is_kept_and_given_up_only_when_no_leaf_fits(
    scores: list[float], width: int, seed: int, budget: int
) -> None:
    level = random_level(np.random.default_rng(seed), scores, width)
    selection = select("ets", level, kv_budget_tokens=budget)
    room = budget - level.growth_tokens
    kept = np.flatnonzero(selection.allocation)
    alone = [held_tokens(level, np.array([place])) for place in range(len(scores))]
    if kept.size == 0:
        assert min(alone) > room
    else:
        assert selection.allocation.sum() == width
        assert held_tokens(level, kept) <= room + 1e-9


@settings(max_examples=60)
@given(scores=SCORES, width=st.integers(1, 64), seed=st.integers(0, 10_000))
def test_free_kv_leaves_the_level_to_rebase(scores: list[float], width: int, seed: int) -> None:
    """Nothing speaks against a leaf that costs nothing: ETS with weight 0 retains what REBASE retains."""
    level = random_level(np.random.default_rng(seed), scores, width)
    expected = rebase_allocation(level.scores, width, SearchConfig().rebase_temperature)
    assert shares("ets_kv", level, kv_cost_weight=0.0) == expected.tolist()


def test_dear_kv_retains_one_cost_node() -> None:
    level = random_level(np.random.default_rng(3), [0.1, 0.5, 0.9, 0.3], 16)
    dear = CostTree(level.kv.parent, level.kv.cost + 1, np.array([1, 2, 3, 3]))
    kept = np.flatnonzero(select("ets_kv", level_of([0.1, 0.5, 0.9, 0.3], 16, kv=dear), kv_cost_weight=1e4).allocation)
    assert np.unique(dear.leaf[kept]).size == 1
