"""The reductions alone: each rule on a forest of a few nodes, and where they leave the decision to the solver."""

from __future__ import annotations

import numpy as np

from sglang_ets.core.reduction import Core, reduce_level


def reduced(
    weight: list[float],
    parent: list[int],
    covers: dict[int, set[int]] | None = None,
    bonus: list[float] | None = None,
    covered: set[int] | None = None,
) -> Core:
    return reduce_level(weight, parent, covers or {}, covered or set(), bonus or [])


def test_what_is_worth_keeping_is_kept_and_what_loses_is_dropped() -> None:
    core = reduced([-1.0, 1.0, -0.5, 0.0], [-1, 0, 0, -1])
    assert sorted(core.kept) == [0, 1, 3], "node 1 pays for its parent, node 3 is free"
    assert core.members == []


def test_a_chain_is_one_node() -> None:
    # Node 2 is dear, and its cluster is covered elsewhere too; nothing but node 2 speaks for 0 and 1.
    core = reduced([-0.1, -0.1, -0.5, -0.5], [-1, 0, 1, -1], {2: {0}, 3: {0}}, [1.0])
    assert [sorted(members) for members in core.members] == [[0, 1, 2], [3]]
    assert np.allclose(core.weight, [-0.7, -0.5])
    assert core.parent.tolist() == [-1, -1]
    assert core.kept == []


def test_what_may_break_even_is_left_to_the_solver() -> None:
    core = reduced([-1.0, -1.0, -1.5], [-1, -1, -1], {0: {0}, 1: {0}, 2: {0}}, [1.0])
    assert core.members == [[0], [1]]
    assert core.covers == [{0}, {0}]


def test_of_equal_siblings_with_one_cluster_the_first_stays() -> None:
    siblings = {1: {0}, 2: {0}, 3: {0}}
    for weight, kept in (([-0.2, -0.2], 1), ([-0.2, -0.1], 2), ([-0.1, -0.2], 1)):
        core = reduced([-0.3, *weight, -0.4], [-1, 0, 0, -1], dict(siblings), [1.0])
        assert [sorted(members) for members in core.members] in ([[0, kept], [3]], [[3], [0, kept]])


def test_a_cluster_that_is_covered_for_sure_is_worth_nothing() -> None:
    covers = {0: {0}, 1: {0, 1}, 2: {1}}
    core = reduced([-0.5, -0.5, -0.5], [-1, -1, -1], covers, [1.0, 0.4], covered={0})
    assert (core.kept, core.members) == ([], [])


def test_a_cluster_that_one_node_covers_is_part_of_its_weight() -> None:
    core = reduced([-0.5, -0.5], [-1, -1], {0: {0}, 1: {1}}, [1.0, 0.4])
    assert (core.kept, core.members) == ([0], [])
