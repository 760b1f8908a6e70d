"""The valve of the PRM's pool: which locks are given up when what is to be scored does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator

from sglang_ets.kv import Hold, RadixLedger

logger = logging.getLogger(__name__)


class PathValve:
    """Knows the searches by age and counts what each of them had to give up."""

    def __init__(self, ledger: RadixLedger) -> None:
        self._ledger = ledger
        self._num_releases: dict[str, int] = {}  # per search that has begun, the oldest first
        self.total_releases = 0  # over the life of the server

    def begin(self, owner: str) -> None:
        """A search takes its place in the order of age. Idempotent."""
        self._num_releases.setdefault(owner, 0)

    def end(self, owner: str) -> None:
        """Forget a search. Idempotent."""
        self._num_releases.pop(owner, None)

    @property
    def is_idle(self) -> bool:
        """Whether no search has begun that has not ended."""
        return not self._num_releases

    def num_releases(self, owner: str) -> int:
        """Locks that a search has given up so far."""
        return self._num_releases.get(owner, 0)

    def opener(self, present: Collection[Hold]) -> Callable[[bool], bool]:
        """For one pass: gives up one lock a call, and returns False if none is left.

        Paths that the present batch does not read go first, those that it does only at any price (called with True); in
        both the youngest search's before an older one's, and of one search the newest.
        """
        kept = {id(hold) for hold in present}
        others = (hold for hold in self._in_order() if id(hold) not in kept)

        def give_up(at_any_price: bool) -> bool:
            hold = next(others, None)
            if hold is None and at_any_price:
                hold = next(self._in_order(), None)
            if hold is not None:
                self._release(hold)
            return hold is not None

        return give_up

    def _in_order(self) -> Iterator[Hold]:
        for owner in reversed(list(self._num_releases)):
            yield from reversed(self._ledger.holds(owner))

    def _release(self, hold: Hold) -> None:
        self._ledger.release(hold)
        self.total_releases += 1
        self._num_releases[hold.owner] += 1
        if self._num_releases[hold.owner] == 1:
            logger.warning(
                "the PRM's KV pool is too small for what is scored at once: search %s gives up paths, which are computed "
                "again; raise --prm-max-total-tokens or lower search_width",
                hold.owner,
            )
