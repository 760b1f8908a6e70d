"""Children of searches on their way into the engine: ordinary requests go first, then the searches in their order.

sglang's own waiting queue is first come, first served. A search of width 1,024 would stand before whoever comes next, so its
children wait here and enter the engine only as far as rows are left for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from sglang_ets.engine.forks import Forks

ORDINARY_SHARE = 8  # one of so many rows of the engine is kept for ordinary requests
ORDINARY = -1  # goes before every search


def rows_for_children(max_running_requests: int, max_running_steps: int | None) -> int:
    """How many children may be in the engine at once."""
    most = max(1, max_running_requests - max(1, max_running_requests // ORDINARY_SHARE))
    return most if max_running_steps is None else min(most, max_running_steps)


@dataclass(frozen=True)
class Entered:
    """Children that enter the engine in one tick."""

    forks: list[Any]  # they start in the running batch
    queued: list[Any]  # they stand in sglang's waiting queue


class StepQueue:
    """Owned by the coordinator; scheduler thread only. Changes the order of the scheduler's waiting queue."""

    def __init__(self, scheduler: Any, max_inside: int, forks: Forks) -> None:
        self._scheduler = scheduler  # it replaces its waiting queue by a new list in every plan
        self._max_inside = max_inside
        self._forks = forks
        self._pending: dict[str, deque[Any]] = {}
        self._inside: dict[str, str] = {}  # id of a child in the engine -> its search

    def add(self, owner: str, child: Any) -> None:
        """A child of this search wants to run."""
        self._pending.setdefault(owner, deque()).append(child)

    def add_first(self, owner: str, children: Sequence[Any]) -> None:
        """Children of this search that have begun elsewhere want to go on."""
        self._pending.setdefault(owner, deque()).extendleft(reversed(children))

    def left(self, child_id: str) -> None:
        """The child has left the engine: finished, or aborted while it waited there. Idempotent."""
        self._inside.pop(child_id, None)

    def feed(self, order: Sequence[str]) -> Entered:
        """Let children of these searches enter the engine, the first search's first.

        A child that cannot start in the running batch enters sglang's queue, whose rules count for it from there.
        """
        entered = Entered([], [])
        room = self._forks.room() if any(self._pending.get(owner) for owner in order) else None
        for owner in order:
            pending = self._pending.get(owner)
            while pending and len(self._inside) < self._max_inside:
                child = pending.popleft()
                self._inside[child.rid] = owner
                if room is not None and self._forks.admits(child, room):
                    entered.forks.append(child)
                else:
                    self._scheduler.waiting_queue.append(child)
                    entered.queued.append(child)
        if self._inside and len(self._scheduler.waiting_queue) > 1:
            place = {owner: index for index, owner in enumerate(order)}
            self._scheduler.waiting_queue.sort(key=lambda req: self._place(req.rid, place))
        return entered

    def _place(self, request_id: str, place: dict[str, int]) -> int:
        owner = self._inside.get(request_id)
        return ORDINARY if owner is None else place.get(owner, len(place))

    def withdraw(self, owner: str) -> int:
        """Take the search's children that wait in sglang's queue back, in order. Returns their number."""
        back = [req for req in self._scheduler.waiting_queue if self._inside.get(req.rid) == owner]
        if back:
            self._scheduler.waiting_queue[:] = [
                req for req in self._scheduler.waiting_queue if self._inside.get(req.rid) != owner
            ]
            for child in back:
                del self._inside[child.rid]
            self._pending.setdefault(owner, deque()).extendleft(reversed(back))
        return len(back)

    def discard(self, owner: str) -> list[Any]:
        """Forget the search's children that are not in the engine. Returns them."""
        return list(self._pending.pop(owner, ()))

    def remove(self, owner: str, ids: Set[str]) -> list[str]:
        """Forget those of the search's children with these ids that do not run. Returns their ids."""
        pending, waiting = self._pending.get(owner, deque()), self._scheduler.waiting_queue
        removed = [req.rid for req in (*pending, *waiting) if req.rid in ids]
        if removed:
            self._pending[owner] = deque(child for child in pending if child.rid not in ids)
            waiting[:] = [req for req in waiting if req.rid not in ids]
            for rid in removed:
                self.left(rid)
        return removed

    def without_children(self, check: Callable[[], bool]) -> bool:
        """What sglang finds when it checks its waiting queue without the children in it; it may take others out."""
        scheduler, whole = self._scheduler, self._scheduler.waiting_queue
        scheduler.waiting_queue = [req for req in whole if req.rid not in self._inside]
        try:
            return check()
        finally:
            left = {id(req) for req in scheduler.waiting_queue}
            scheduler.waiting_queue = [req for req in whole if req.rid in self._inside or id(req) in left]

    def pending(self, owner: str) -> Sequence[Any]:
        """Children of this search that are not in the engine, in order. Those that were taken back may have output."""
        return tuple(self._pending.get(owner, ()))

    @property
    def num_pending(self) -> int:
        """Children, over all searches, that are not in the engine."""
        return sum(len(pending) for pending in self._pending.values())

    @property
    def num_free(self) -> int:
        """Rows that the children which are here already leave to others."""
        return self._max_inside - len(self._inside) - self.num_pending

    @property
    def num_inside(self) -> int:
        """Children, over all searches, that wait or run in the engine."""
        return len(self._inside)
