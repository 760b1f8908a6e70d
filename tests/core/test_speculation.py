"""Which children may begin before their level is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sglang_ets.core.search import Search
from sglang_ets.core.speculation import Forecast, Guess, forecast, known_width
from tests.core.test_search import PROMPT_TOKENS, config_of


def level_of(scores: Sequence[float | None], algorithm: str = "rebase", **fields: Any) -> Search:
    """A first level of which those steps have ended that have scores."""
    search = Search(config_of(algorithm, len(scores), **{"speculate": True, **fields}), PROMPT_TOKENS)
    search.start()
    for node_id, score in enumerate(scores, start=1):
        if score is not None:
            search.on_step(node_id, [node_id, 7], f"{node_id} ", "step")
            search.on_scored(node_id, score, np.full(2, score, dtype=np.float32))
    return search


def expected(search: Search) -> Forecast:
    """What the policy says of the part of the level that has scores."""
    leaves = search.scored_leaves()
    if not leaves:
        return ()
    return forecast(leaves, search.config.policy.select(search.partial_level(leaves), search.config).allocation)


def test_leaves_with_scores_are_asked_about_once_half_of_them_are_there() -> None:
    assert level_of([0.9, None, None]).scored_leaves() == []
    search = level_of([0.9, None, 0.5, None])
    assert [leaf.id for leaf in search.scored_leaves()] == [1, 3]
    assert level_of([0.9, 0.5]).scored_leaves() == [], "selection is about to come"
    assert level_of([0.9, None, 0.5, None], "ets").scored_leaves() == []
    assert len(level_of([0.9, 0.7, 0.5, None], "ets").scored_leaves()) == 3
    search.stop("deadline")
    assert search.scored_leaves() == []


def test_steps_are_wanted_scored_in_parts_as_soon_as_they_can_tell_something() -> None:
    none, some = level_of([None] * 8), level_of([0.5] * 4 + [None] * 4)
    assert [num for num in range(1, 9) if none.wants_scores(num)] == [4, 5, 6, 7, 8]
    assert [num for num in range(1, 5) if some.wants_scores(num)] == [2, 3, 4]
    assert not level_of([None] * 8, speculate=False).wants_scores(8)
    assert [num for num in range(1, 9) if level_of([None] * 8, "ets").wants_scores(num)] == [6, 7, 8]


def test_a_part_of_a_level_has_its_share_of_the_width() -> None:
    search = level_of([0.9, None, 0.5, 0.6, None, None])
    level = search.partial_level(search.scored_leaves())
    assert (level.remaining_width, level.growth_tokens, level.depth) == (3, 3 * 2, 1)
    assert level.scores.tolist() == [0.9, 0.5, 0.6]
    search.on_step(2, [5], "5 ", "stop")
    search.on_scored(2, 1.0, None)  # complete: 5 are left, of which 3 have scores
    assert search.partial_level(search.scored_leaves()).remaining_width == 3
    assert (known_width(7, 2, 4), known_width(1, 1, 8)) == (4, 1)


def test_what_is_expected_comes_best_first() -> None:
    assert expected(level_of([0.2, 0.8, 0.8, 0.5, None, None, None, None])) == ((2, 2), (3, 2))
    assert expected(level_of([0.1, 0.9, 0.5, None, None], "beam")) == ((2, 2), (3, 1))


@pytest.mark.parametrize("center", [True, False])
def test_a_part_has_embeddings_and_leaves_the_center_as_it_was(center: bool) -> None:
    other = level_of([0.5, 0.7, 0.8, 0.9], "ets", center_embeddings=center)
    search = level_of([0.5, 0.7, 0.8, None], "ets", center_embeddings=center)
    for _ in range(2):
        part = search.partial_level(search.scored_leaves())
        assert part.embeddings is not None and part.embeddings.shape == (3, 2)
    search.on_step(4, [4, 7], "4 ", "step")
    search.on_scored(4, 0.9, np.full(2, 0.9, dtype=np.float32))
    whole, same = search.level(None).embeddings, other.level(None).embeddings
    assert whole is not None and same is not None
    assert whole.tolist() == same.tolist()


def test_rows_of_a_level_are_never_more_than_its_nodes() -> None:
    search = level_of([0.9, None, 0.7, 0.65, None, None])
    wanted = ((1, 2), (3, 1), (4, 1))
    assert search.guesses(wanted, {}, 0, 99) == [Guess(1, 0, 2, 6), Guess(3, 0, 1, 6)]
    assert search.guesses(wanted, {}, 0, 2) == [Guess(1, 0, 2, 6)]
    assert search.guesses(wanted, {1: 1}, 1, 99) == [Guess(1, 1, 1, 6), Guess(3, 0, 1, 6)]
    assert search.guesses(wanted, {1: 2}, 2, 99) == [Guess(3, 0, 1, 6)]
    assert search.guesses(wanted, {1: 2, 3: 1}, 3, 99) == []
    search.on_step(2, [5], "5 ", "step")
    assert search.guesses(wanted, {1: 2, 3: 1}, 3, 99) == [Guess(4, 0, 1, 6)], "its row is free, though it has no score"


def test_a_step_has_the_room_that_selection_would_give_it() -> None:
    (guess,) = level_of([0.9, None], max_tokens=10, max_step_tokens=9).guesses(((1, 1),), {}, 0, 9)
    assert guess.max_new_tokens == 10 - 2


def test_what_does_not_go_on_is_not_asked_about() -> None:
    search = level_of([None, None, None, 0.5])
    search.on_step(1, [5], "5 ", "stop")
    search.on_scored(1, 1.0, None)
    search.on_failed(2, "aborted")
    assert [leaf.id for leaf in search.scored_leaves()] == [4]
    assert search.partial_level(search.scored_leaves()).remaining_width == 2  # of 3, for one leaf of two


@pytest.mark.parametrize(
    "fields",
    [
        {"speculate": False},
        {"algorithm": "best_of_n"},
        {"max_total_tokens": 99},
        {"algorithm": "ets", "kv_budget_tokens": 99},
    ],
)
def test_where_nothing_is_guessed(fields: dict[str, Any]) -> None:
    search = level_of([0.9, 0.8, None, None], **fields)
    assert not search.speculates
    assert search.guesses(((1, 2),), {}, 0, 9) == []


def test_a_complete_level_waits_for_its_selection_alone() -> None:
    assert level_of([0.9, 0.8]).guesses(((1, 2),), {}, 0, 9) == []
    search = level_of([0.9, None])
    search.stop("deadline")
    assert search.guesses(((1, 2),), {}, 0, 9) == []
