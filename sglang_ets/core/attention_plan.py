"""Which stretches of KV several rows of a decode batch share, so that attention reads each of them once.

Rows of a search share their prefixes as the leaves of a tree do. The plan cuts that tree into segments, from the root to
the leaves; what a row has after its last segment is its private suffix. It holds as long as the set of rows and the KV before
their divergence stay the same: rows that only grow need no new plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Reads of KV tokens that a segment must save per step, and segments of one row. On a GPU each segment is more work for the
# reduction, in buffers of fixed size; these are estimates. The kernel for the CPU gained from every segment that was measured.
MIN_SAVED_TOKENS, MAX_SEGMENTS = 256, 4
MIN_SAVED_TOKENS_CPU, MAX_SEGMENTS_CPU = 16, 64
TREE_BACKEND = "ets_tree"  # the name of our backend among sglang's
WINDOW = 256  # positions compared at once
Span = tuple[Hashable, int, int]  # what holds positions start to end: equal ids are the same KV


@dataclass(frozen=True)
class Segment:
    """KV of positions `start` to `end`, the same in all `rows`."""

    start: int
    end: int
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Every position of a row lies in one of its segments or, from `private_from` on, in its private suffix."""

    order: NDArray[np.int64]  # [rows]: all rows, such that those of a segment lie side by side
    spans: NDArray[np.int64]  # [segments, 4]: start, end, first and last place in `order`; a row's in order of position
    private_from: NDArray[np.int64]  # [rows], position, by row

    def segments(self) -> Iterator[Segment]:
        """From the root to the leaves, depth first."""
        for start, end, first, last in self.spans.tolist():
            yield Segment(start, end, tuple(self.order[first:last].tolist()))

    @property
    def saved_tokens(self) -> int:
        """KV tokens that a decode step need not read again."""
        start, end, first, last = self.spans.T
        return int(((last - first - 1) * (end - start)).sum())


def plan_paths(
    paths: Sequence[Sequence[Span]],  # per row, from position 0 on without gaps
    *,
    min_saved_tokens: int = MIN_SAVED_TOKENS,
    max_segments: int = MAX_SEGMENTS,
) -> AttentionPlan:
    """Plan from what the search knows: rows share a span if its id is the same. No look at single tokens.

    Raises:
        ValueError: spans of a row leave a gap, or one id stands for two stretches.
    """
    number: dict[Hashable, int] = {}
    stretches: dict[Hashable, tuple[int, int]] = {}
    shape = (len(paths), max(map(len, paths), default=0))
    keys, ends = np.empty(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    keys[:] = -1 - np.arange(len(paths))[:, None]  # a row that has ended is like no other
    for row, path in enumerate(paths):
        at = 0
        for place, (name, start, end) in enumerate(path):
            if start != at or end < start:
                raise ValueError(f"span {name!r} of row {row} is {start} to {end}; expected it to begin at {at}")
            if stretches.setdefault(name, (start, end)) != (start, end):
                raise ValueError(f"span {name!r} is {start} to {end} in row {row}, but {stretches[name]} in another")
            keys[row, place], ends[row, place], at = number.setdefault(name, len(number)), end, end
    return _plan(keys, ends, min_saved_tokens, max_segments)


def plan_slots(
    slots: Sequence[NDArray[np.integer]],  # per row, the pool slot of each position
    *,
    min_saved_tokens: int = MIN_SAVED_TOKENS,
    max_segments: int = MAX_SEGMENTS,
) -> AttentionPlan:
    """Plan from the common prefixes of the rows' slots, when nobody knows the tree."""
    shape = (len(slots), max(map(len, slots), default=0))
    keys = np.empty(shape, dtype=np.int64)
    for row, page in enumerate(slots):
        keys[row, : len(page)], keys[row, len(page) :] = page, -1 - row
    ends = np.broadcast_to(np.arange(1, shape[1] + 1), shape)
    return _plan(keys, ends, min_saved_tokens, max_segments)


def _plan(
    keys: NDArray[np.int64],  # [rows, places]: rows with the same keys up to a place share everything up to it
    ends: NDArray[np.int64],  # [rows, places], position after each place
    min_saved_tokens: int,
    max_segments: int,
) -> AttentionPlan:
    """Depth first; a stretch that does not pay is left to the segments below it, so that segments stay without gaps."""
    order: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    private_from = np.zeros(len(keys), dtype=np.int64)
    todo = [(list(range(len(keys))), 0, 0, 0)]  # rows, places known to agree, position after the last segment, segments
    while todo:
        rows, place, start, num_segments = todo.pop()
        place = _agreed(keys, rows, place) if len(rows) > 1 else keys.shape[1]
        end = int(ends[rows[0], place - 1]) if len(rows) > 1 and place else start
        if num_segments < max_segments and (len(rows) - 1) * (end - start) >= max(min_saved_tokens, 1):
            spans.append((start, end, len(order), len(order) + len(rows)))
            start, num_segments = end, num_segments + 1
        if place == keys.shape[1]:
            order += rows
            private_from[rows] = start
            continue
        groups: dict[int, list[int]] = {}
        for row, key in zip(rows, keys[rows, place].tolist(), strict=True):
            groups.setdefault(key, []).append(row)
        todo += [(group, place, start, num_segments) for group in reversed(groups.values())]
    return AttentionPlan(np.array(order, dtype=np.int64), np.array(spans, dtype=np.int64).reshape(-1, 4), private_from)


def _agreed(keys: NDArray[np.int64], rows: list[int], place: int) -> int:
    """The first place from `place` on at which not all rows agree."""
    while place < keys.shape[1]:
        window = keys[rows, place : place + WINDOW]
        is_equal = (window == window[0]).all(axis=0)
        if not is_equal.all():
            return place + int(is_equal.argmin())
        place += len(is_equal)
    return place
