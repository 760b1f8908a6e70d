"""The tensor-parallel ranks of one scheduler. All run every search, tick by tick; what they must agree on is said by the first.

Ranks compute the same from the same tokens. A clock, a solver, another process, or the last bit of a sum may differ.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import broadcast_pyobj

T = TypeVar("T")


class Ranks(Protocol):
    """Who this rank is among those that run the same searches."""

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that decides."""

    def from_first(self, value: T) -> T:
        """The first rank's value, on every rank. A collective call: all ranks make it, in the same order."""


class OneRank:
    """A scheduler without tensor parallelism."""

    is_alone = True
    is_first = True

    def from_first(self, value: T) -> T:
        return value


class GroupRanks:
    """The ranks of a process group of sglang's."""

    is_alone = False

    def __init__(self, group: Any) -> None:
        self._group = group

    @property
    def is_first(self) -> bool:
        return bool(self._group.rank == self._group.ranks[0])

    def from_first(self, value: T) -> T:
        group = self._group
        said: list[T] = broadcast_pyobj([value], group.rank, group.cpu_group, src=group.ranks[0])
        return said[0]


ONE_RANK = OneRank()


def current_ranks() -> Ranks:
    """Those of sglang's runtime context."""
    parallel = get_parallel()
    return GroupRanks(parallel.tp_group) if parallel.tp_size > 1 else ONE_RANK
