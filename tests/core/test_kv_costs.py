"""Costs of a level against the plain definition: keeping leaves holds every distinct prefix of their tokens once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ets.core.kv_costs import shared_length, token_costs

# Few tokens, so that trajectories share, repeat and end inside each other.
trajectories = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=8)


def num_prefixes(kept: list[list[int]]) -> int:
    return len({tuple(tokens[:end]) for tokens in kept for end in range(1, len(tokens) + 1)})


@given(level=trajectories, data=st.data())
def test_what_leaves_cost_together_is_their_distinct_prefixes(level: list[list[int]], data: st.DataObject) -> None:
    tree = token_costs(level)
    kept = data.draw(st.lists(st.booleans(), min_size=len(level), max_size=len(level)))
    cost = tree.cost[tree.held(np.array(kept))].sum()
    assert cost == num_prefixes([tokens for tokens, is_kept in zip(level, kept, strict=True) if is_kept])


@given(level=trajectories)
def test_nodes_are_the_longest_runs_in_order_of_first_occurrence(level: list[list[int]]) -> None:
    tree = token_costs(level)
    assert (tree.cost > 0).all()
    assert all(parent < node for node, parent in enumerate(tree.parent.tolist()))
    for node in range(tree.parent.size):
        is_end, num_below = node in tree.leaf, int((tree.parent == node).sum())
        assert is_end or num_below > 1, "a run that nothing leaves or ends inside is one node"
    ends = {tuple(tokens): end for tokens, end in zip(level, tree.leaf.tolist(), strict=True)}
    assert [ends[tuple(tokens)] for tokens in level] == tree.leaf.tolist()
    assert len(set(ends.values())) == len(ends)


def test_a_small_level_by_hand() -> None:
    tree = token_costs([[7, 8, 9], [7, 8, 4, 4], [1], [7, 8], [], [7, 8, 9]])
    assert tree.parent.tolist() == [-1, 0, 0, -1]
    assert tree.cost.tolist() == [2, 1, 2, 1]
    assert tree.leaf.tolist() == [1, 2, 3, 0, -1, 1]


@pytest.mark.parametrize(
    ("one", "other", "length"), [((), (1,), 0), ((1, 2), (1, 2), 2), ((1, 2), (1, 2, 3), 2), ((1, 2), (2, 2), 0)]
)
def test_shared_length(one: tuple[int, ...], other: tuple[int, ...], length: int) -> None:
    assert shared_length(one, other) == shared_length(other, one) == length
