"""REBASE and even shares: sums, order, permutations, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_ets.core.allocation import even_allocation, inherited_scores, rebase_allocation

SCORES = st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=1, max_size=40)


@settings(max_examples=200)
@given(scores=SCORES, width=st.integers(0, 300), temperature=st.sampled_from([1e-3, 0.05, 0.2, 1.0, 1e3]))
def test_rebase_shares_the_whole_width_and_favours_better_scores(
    scores: list[float], width: int, temperature: float
) -> None:
    given_scores = np.array(scores)
    shares = rebase_allocation(given_scores, width, temperature)
    assert shares.sum() == width
    assert shares.min() >= 0
    order = np.argsort(-given_scores, kind="stable")
    assert (np.diff(shares[order]) <= 0).all(), "a better score never gets less"


@given(scores=st.lists(st.integers(0, 1000), min_size=1, max_size=20, unique=True), seed=st.integers(0, 99))
def test_rebase_does_not_depend_on_the_order_of_different_scores(scores: list[int], seed: int) -> None:
    values = np.array(scores) / 1000
    shuffled = np.random.default_rng(seed).permutation(values.size)
    shares = rebase_allocation(values, 16, 0.2)
    assert rebase_allocation(values[shuffled], 16, 0.2).tolist() == shares[shuffled].tolist()


def test_rebase_by_hand() -> None:
    # weights e^0, e^-1, e^-2: shares of 8 are 5.32, 1.96 and .72; each is rounded up while width is left
    assert rebase_allocation(np.array([0.0, 0.2, 0.4]), 8, 0.2).tolist() == [0, 2, 6]
    assert rebase_allocation(np.array([0.5, 0.5, 0.5, 0.5]), 6, 0.2).tolist() == [2, 2, 1, 1]


def test_a_share_that_is_whole_up_to_rounding_is_not_rounded_up() -> None:
    scores = np.array([0.25, 0.25, 0.15, 0.45, 0.75, 0.15, 0.15])
    # Of the last 15, three equal scores get 5 each; in floating point the first of them has 5.000000000000001.
    assert rebase_allocation(scores, 45, 1.0).tolist() == [6, 6, 5, 8, 10, 5, 5]


@pytest.mark.parametrize("scores", [[], [np.nan], [np.inf, 0.0]])
def test_rebase_refuses_what_has_no_shares(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="finite scores"):
        rebase_allocation(np.array(scores), 4, 0.2)


@given(scores=SCORES, width=st.integers(1, 100))
def test_even_shares_differ_by_one_at_most(scores: list[float], width: int) -> None:
    kept = np.arange(0, len(scores), 2)
    shares = even_allocation(np.array(scores), kept, width)
    assert shares.sum() == width
    assert set(np.flatnonzero(shares)) <= set(kept.tolist())
    assert shares[kept].max() - shares[kept].min() <= 1


def test_kept_leaves_inherit_the_weight_of_their_cluster() -> None:
    # softmax weights 3, 1, 2, 2 at temperature .5; the first cluster weighs 4 whether one or both of its leaves are kept
    scores = 0.5 * np.log([3.0, 1.0, 2.0, 2.0])
    clusters = np.array([0, 0, 1, 2])
    for kept in ([True, False, True, True], [False, True, True, True]):
        raised = inherited_scores(scores, clusters, np.array(kept), 0.5)[kept]
        assert rebase_allocation(raised, 8, 0.5).tolist() == [4, 2, 2]
    assert inherited_scores(scores, clusters, np.ones(4, dtype=np.bool_), 0.5) == pytest.approx(scores)


@given(
    leaves=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.booleans()), min_size=1, max_size=20),
    temperature=st.sampled_from([0.001, 0.2, 5.0]),
)
@example(leaves=[(1.0, 0, False), (0.28125, 0, True)], temperature=0.001)  # a share too small for a ratio
def test_inherited_scores_are_finite_and_never_lower(leaves: list[tuple[float, int, bool]], temperature: float) -> None:
    scores = np.array([score for score, _, _ in leaves])
    clusters = np.unique([cluster for _, cluster, _ in leaves], return_inverse=True)[1].astype(np.int64)
    kept = np.array([keep for _, _, keep in leaves])
    raised = inherited_scores(scores, clusters, kept, temperature)
    assert np.isfinite(raised).all()
    assert (raised >= scores - 1e-12).all()
    assert raised[~kept].tolist() == scores[~kept].tolist()
