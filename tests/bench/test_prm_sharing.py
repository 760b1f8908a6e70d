"""What sharing a whole PRM's work over ranks could save, on trees small enough to count by hand."""

from __future__ import annotations

import pytest

from bench.studies.prm_sharing import distinct_steps, gain


def node(own: int, parent: int, depth: int, *token_ids: int) -> dict[str, object]:
    return {"id": own, "parent": parent, "depth": depth, "token_ids": list(token_ids)}


TWO_BRANCHES = [node(1, 0, 1, 5, 6, 7), node(2, 0, 1, 6, 6, 6), node(3, 1, 2, 8, 8, 8), node(4, 2, 2, 9, 9, 9)]
# All behind one first step, which both ranks would need.
ONE_BRANCH = [node(1, 0, 1, 5, 6, 7), *(node(own, 1, 2, 8, own, 8) for own in (2, 3, 4, 5))]


def test_equal_steps_behind_the_same_steps_are_scored_once() -> None:
    tree = [*TWO_BRANCHES, node(5, 0, 1, 5, 6, 7), node(6, 5, 2, 8, 8, 8), node(7, 5, 2, 1)]
    steps = distinct_steps(tree)
    assert set(steps) == {1, 2, 3, 4, 7}
    assert steps[7].parent == 1


@pytest.mark.parametrize("anywhere", [False, True])
def test_branches_from_the_prompt_on_halve_the_work(anywhere: bool) -> None:
    assert gain(TWO_BRANCHES, 1, anywhere=anywhere) == 1
    assert gain(TWO_BRANCHES, 2, anywhere=anywhere) == 2


def test_one_branch_stays_on_its_rank_or_is_computed_again() -> None:
    # Four tokens of the first step, then four steps of four; one of these with the three tokens before it on the other rank.
    assert gain(ONE_BRANCH, 2, anywhere=False) == 1
    assert gain(ONE_BRANCH, 2, anywhere=True) == pytest.approx((4 + 16) / (4 + 11))
