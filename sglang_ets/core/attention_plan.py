"""Which stretches of KV several rows of a decode batch share, so that attention reads each of them once.

Rows of a search share their prefixes as the leaves of a tree do. The plan cuts that tree into segments, from the root to
the leaves; what a row has after its last segment is its private suffix. It holds as long as the set of rows and the KV before
their divergence stay the same: rows that only grow need no new plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# Reads of KV tokens that a segment must save per step, and segments of one row. On a GPU each segment is more work for the
# reduction, in buffers of fixed size; these are estimates. The kernel for the CPU gained from every segment that was measured.
MIN_SAVED_TOKENS, MAX_SEGMENTS = 256, 4
MIN_SAVED_TOKENS_CPU, MAX_SEGMENTS_CPU = 16, 64
TREE_BACKEND = "ets_tree"  # the name of our backend among sglang's
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


class SlotPlanner:
    """Plans from the common prefixes of the rows' slots, when nobody knows the tree, for one decode step after another.

    Rows that have only grown keep their plan.
    """

    def __init__(self, min_saved_tokens: int = MIN_SAVED_TOKENS, max_segments: int = MAX_SEGMENTS) -> None:
        self._limits = min_saved_tokens, max_segments
        self._keys = np.empty((0, 0), dtype=np.int64)
        self._last = _plan(self._keys, self._keys, *self._limits)

    def plan(
        self,
        slots: NDArray[np.integer],  # [rows, positions], the pool slot of each position
        lengths: NDArray[np.integer],  # [rows], positions that each row has
    ) -> AttentionPlan:
        """The plan of these rows. They are known again by their slots alone: other requests may have taken their places."""
        is_slot = np.arange(slots.shape[1]) < lengths[:, None]
        keys = np.where(is_slot, slots, -1 - np.arange(len(slots))[:, None]).astype(np.int64)
        if not self._has_only_grown(keys):
            ends = np.broadcast_to(np.arange(1, keys.shape[1] + 1), keys.shape)
            self._keys, self._last = keys, _plan(keys, ends, *self._limits)
        return self._last

    def _has_only_grown(self, keys: NDArray[np.int64]) -> bool:
        planned = self._keys
        if len(keys) != len(planned) or keys.shape[1] < planned.shape[1]:
            return False
        return bool(((keys[:, : planned.shape[1]] == planned) | (planned < 0)).all())


def _plan(
    keys: NDArray[np.int64],  # [rows, places]: rows with the same keys up to a place share everything up to it
    ends: NDArray[np.int64],  # [rows, places], position after each place
    min_saved_tokens: int,
    max_segments: int,
) -> AttentionPlan:
    """Depth first; a stretch that does not pay is left to the segments below it, so that segments stay without gaps.

    In the sorted keys the rows of a segment are neighbours, and what it agrees in is the least that two neighbours do.
    """
    num_keys, places = keys.shape
    if not keys.size:
        return AttentionPlan(np.arange(num_keys), np.empty((0, 4), dtype=np.int64), np.zeros(num_keys, dtype=np.int64))
    as_bytes = np.ascontiguousarray(keys).view(np.dtype((np.void, keys.itemsize * places)))
    by_key = as_bytes.ravel().argsort(kind="stable")
    is_other = keys[by_key[1:]] != keys[by_key[:-1]]
    agreed_places = np.where(is_other.any(axis=1), is_other.argmax(axis=1), places)  # of each of `by_key` with the next
    agreed, neighbours = agreed_places.tolist(), by_key.tolist()
    agreed_ends = np.where(agreed_places > 0, ends[by_key[:-1], agreed_places - 1], 0).tolist()
    order: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    private_from = [0] * num_keys
    todo = [(0, num_keys, 0, 0)]  # first and last of neighbours, position after the last segment, number of segments
    while todo:
        first, last, start, num_segments = todo.pop()
        if last - first == 1:
            order.append(neighbours[first])
            private_from[neighbours[first]] = start
            continue
        num_rows, place = last - first, min(agreed[first : last - 1], default=places)
        end = min(agreed_ends[first : last - 1], default=start)
        if num_segments < max_segments and (num_rows - 1) * (end - start) >= max(min_saved_tokens, 1):
            spans.append((start, end, len(order), len(order) + num_rows))
            start, num_segments = end, num_segments + 1
        if place == places:
            rows = sorted(neighbours[first:last])
            order += rows
            for row in rows:
                private_from[row] = start
            continue
        bounds = [first, *(at + 1 for at in range(first, last - 1) if agreed[at] == place), last]
        groups = sorted((min(neighbours[begin:end]), begin, end) for begin, end in pairwise(bounds))
        todo += [(begin, end, start, num_segments) for _, begin, end in reversed(groups)]
    segments = np.array(spans, dtype=np.int64).reshape(-1, 4)
    return AttentionPlan(np.array(order, dtype=np.int64), segments, np.array(private_from, dtype=np.int64))
