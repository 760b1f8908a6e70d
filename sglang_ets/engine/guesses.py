"""The children that a search began before selection, on the guess that it keeps their leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang_ets.core.speculation import Forecast
from sglang_ets.kv import Hold

if TYPE_CHECKING:
    from sglang_ets.engine.children import ChildReq, Member

Place = tuple[int, int]  # node id of a leaf, and the index of a child among its children


@dataclass(frozen=True)
class Ended:
    """A child that has ended, and a hold on what it left for each of its members; none if it failed."""

    child: ChildReq
    holds: list[Hold]


@dataclass
class Guesses:
    """Of one search. A guess is a member without a node: its `node_id` is negative until selection makes the node.

    What nobody wants any more is a request without members; it is here until it has left the engine.
    """

    children: dict[str, ChildReq] = field(default_factory=dict)  # that have not ended, by their ids
    parted: dict[str, Hold] = field(default_factory=dict)  # what children that left a strand start from, by their ids
    ended: list[Ended] = field(default_factory=list)
    members: dict[Place, Member] = field(default_factory=dict)  # that have no node yet
    num_begun: dict[int, int] = field(default_factory=dict)  # children of each leaf of this level, failed ones too
    expected: Forecast = ()  # what selection would want of the leaves that had their scores when it was asked
    is_stale: bool = False  # others have got theirs since
    is_due: bool = False  # something has changed since the last guess
    is_stopped: bool = False  # until the level is complete
    has_failed: bool = False  # the policy cannot be asked before a level is complete
    num_leaves: int = 0
    num_children: int = 0
    num_used: int = 0  # children that became nodes
    tokens_wasted: int = 0  # computed for children that did not, by rows that no node shared

    @property
    def num_running(self) -> int:
        """Members that have not ended."""
        return sum(len(child.members) for child in self.children.values())

    def holds(self) -> list[Hold]:
        """All locks of guesses."""
        return [*self.parted.values(), *(hold for ended in self.ended for hold in ended.holds)]

    def claim(self, place: Place, node_id: int) -> bool:
        """Selection has made the node at this place. Returns whether its step has begun."""
        member = self.members.pop(place, None)
        if member is None:
            return False
        member.node_id = node_id
        self.num_used += 1
        return True
