"""The attention plan: every position of every row once, segments only where they pay, the same from paths and from slots."""

from __future__ import annotations

from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ets.core.attention_plan import AttentionPlan, Segment, SlotPlanner, Span, plan_paths

Tree = list[list[Span]]


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Paths of rows that end at random nodes of a random forest, in any order, duplicates among them."""
    parents = draw(st.lists(st.integers(-1, 30), max_size=30))
    paths: Tree = [[]]
    for node, parent in enumerate(parents):
        above = paths[(parent + 1) % len(paths)]
        start = above[-1][2] if above else 0
        paths.append([*above, (f"node {node}", start, start + draw(st.integers(0, 300)))])
    return draw(st.lists(st.sampled_from(paths), max_size=20))


def slots_of(paths: Tree) -> list[np.ndarray]:
    """A pool slot for each position of each node."""
    fresh, slots = count(), {}
    for path in paths:
        for name, start, end in path:
            if name not in slots:
                slots[name] = [next(fresh) for _ in range(end - start)]
    return [np.array([slot for name, _, _ in path for slot in slots[name]], dtype=np.int32) for path in paths]


def padded(slots: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one matrix and their lengths; what lies behind a row's end is another's slots, as in `req_to_token`."""
    lengths = np.array([len(page) for page in slots], dtype=np.int64)
    matrix = np.full((len(slots), lengths.max(initial=0)), 3, dtype=np.int32)
    for row, page in enumerate(slots):
        matrix[row, : len(page)] = page
    return matrix, lengths


def plain(plan: AttentionPlan) -> tuple[list[Segment], list[int], list[int]]:
    return list(plan.segments()), plan.order.tolist(), plan.private_from.tolist()


@given(trees(), st.sampled_from([1, 30, 256]), st.integers(0, 5))
def test_each_position_is_covered_once_and_only_with_its_own_kv(paths: Tree, least: int, most: int) -> None:
    slots = slots_of(paths)
    plan = plan_paths(paths, min_saved_tokens=least, max_segments=most)
    assert sorted(plan.order) == list(range(len(paths)))
    covered = [Counter(range(start, len(slots[row]))) for row, start in enumerate(plan.private_from.tolist())]
    reached = [0] * len(paths)
    for segment in plan.segments():
        assert (len(segment.rows) - 1) * (segment.end - segment.start) >= least
        for row in segment.rows:
            assert segment.start == reached[row]  # root to leaf, without a gap
            reached[row] = segment.end
            covered[row].update(range(segment.start, segment.end))
            shared = slots[segment.rows[0]][segment.start : segment.end]
            assert slots[row][segment.start : segment.end].tolist() == shared.tolist()
    assert reached == plan.private_from.tolist()
    assert covered == [Counter(range(len(page))) for page in slots]
    num_segments = Counter(row for segment in plan.segments() for row in segment.rows)
    assert max(num_segments.values(), default=0) <= most
    read = sum(map(len, slots)) - plan.saved_tokens
    assert read >= len({slot for page in slots for slot in page.tolist()})


@given(trees(), st.sampled_from([1, 256]))
def test_slots_and_paths_give_the_same_plan_every_time(paths: Tree, least: int) -> None:
    plan = plain(plan_paths(paths, min_saved_tokens=least))
    assert plain(plan_paths(paths, min_saved_tokens=least)) == plan
    by_slots = SlotPlanner(least).plan(*padded(slots_of(paths)))
    # Rows may come in another order inside a group (an empty node is a node, but no slots): compare what is shared.
    shared = {(one.start, one.end, frozenset(one.rows)) for one in plan[0]}
    assert {(one.start, one.end, frozenset(one.rows)) for one in by_slots.segments()} == shared
    assert by_slots.private_from.tolist() == plan[2]


@given(trees())
def test_with_no_limit_everything_shared_is_read_once(paths: Tree) -> None:
    plan = plan_paths(paths, min_saved_tokens=1, max_segments=100)
    slots = slots_of(paths)
    assert sum(map(len, slots)) - plan.saved_tokens == len({slot for page in slots for slot in page.tolist()})


@given(trees(), st.data())
def test_rows_that_only_grow_keep_their_plan_and_others_get_the_plan_of_a_new_planner(
    paths: Tree, data: st.DataObject
) -> None:
    planner, slots = SlotPlanner(1, 100), slots_of(paths)
    first = planner.plan(*padded(slots))
    grown = [np.append(page, np.int32(100_000 + row)) for row, page in enumerate(slots)]
    assert planner.plan(*padded(grown)) is first
    changed = data.draw(st.lists(st.sampled_from(grown), max_size=20)) if grown else []
    mine, fresh = planner.plan(*padded(changed)), SlotPlanner(1, 100).plan(*padded(changed))
    if mine is not first:
        assert plain(mine) == plain(fresh)
    for segment in mine.segments():
        shared = {tuple(changed[row][segment.start : segment.end].tolist()) for row in segment.rows}
        assert len(shared) == 1
        assert len(next(iter(shared))) == segment.end - segment.start


def test_a_row_that_another_request_has_taken_is_planned_anew() -> None:
    planner = SlotPlanner(1, 100)
    both = [np.arange(50, dtype=np.int32), np.arange(50, dtype=np.int32)]
    assert planner.plan(*padded(both)).saved_tokens == 50
    both[1] = np.append(
        np.arange(49, dtype=np.int32), np.int32([70, 71])
    )  # longer, and its last shared slot is another
    assert planner.plan(*padded(both)).saved_tokens == 49
    assert planner.plan(*padded([page[:40] for page in both])).saved_tokens == 40


def test_a_chain_with_the_same_rows_is_one_segment() -> None:
    chain: list[Span] = [("prompt", 0, 90), ("step", 90, 100)]
    plan = plan_paths([[*chain, ("left", 100, 105)], [*chain, ("right", 100, 120)]], min_saved_tokens=100)
    assert plain(plan) == ([Segment(0, 100, (0, 1))], [0, 1], [100, 100])


def test_a_stretch_that_does_not_pay_is_read_by_each_group_below_it() -> None:
    short: Span = ("prompt", 0, 5)
    paths = [[short, (side, 5, 300)] for side in "abab"]
    assert list(plan_paths(paths).segments()) == [Segment(0, 300, (0, 2)), Segment(0, 300, (1, 3))]


def test_a_row_has_at_most_so_many_segments() -> None:
    path: list[Span] = [(at, 100 * at, 100 * at + 100) for at in range(9)]
    paths = [path[:length] for length in range(3, 10)]
    assert [one.end for one in plan_paths(paths, min_saved_tokens=1, max_segments=2).segments()] == [300, 400]


@pytest.mark.parametrize("paths", [[], [[]], [[("prompt", 0, 900)]], [[("a", 0, 900)], [("b", 0, 900)]]])
def test_nothing_to_share(paths: Tree) -> None:
    for plan in (plan_paths(paths), SlotPlanner().plan(*padded(slots_of(paths)))):
        assert plain(plan) == ([], list(range(len(paths))), [0] * len(paths))
        assert plan.saved_tokens == 0


def test_an_exact_threshold_pays() -> None:
    paths: Tree = [[("prompt", 0, 128)]] * 3
    assert plan_paths(paths, min_saved_tokens=256).saved_tokens == 256
    assert plan_paths(paths, min_saved_tokens=257).saved_tokens == 0


def test_spans_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="expected it to begin at 5"):
        plan_paths([[("a", 0, 5), ("b", 6, 7)]])
    with pytest.raises(ValueError, match="but \\(0, 5\\) in another"):
        plan_paths([[("a", 0, 5)], [("a", 0, 6)]])
