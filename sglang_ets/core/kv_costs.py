"""What keeping each leaf of a level costs in KV, from the tokens of the trajectories themselves.

How much of a step is cached at the moment when its level is complete depends on the schedule: the last token may or may not
have been computed yet. What keeping the trajectory *will* hold does not, so a seed fixes the decision whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_ets.core.ilp import CostTree


def token_costs(trajectories: Sequence[Sequence[int]]) -> CostTree:
    """The leaves' tokens as a forest of the longest runs that nothing leaves or ends inside, cost = tokens of the run.

    Leaves with equal tokens end in one node; an empty trajectory costs nothing. Nodes are numbered in order of first
    occurrence, so equal trajectories in equal order give an equal tree.
    """
    forest = _Forest()
    ends: dict[tuple[int, ...], int] = {}
    last: tuple[int, ...] = ()
    for tokens in sorted({tuple(trajectory) for trajectory in trajectories}):
        ends[tokens] = forest.add(tokens, shared_length(last, tokens))
        last = tokens
    return CostTree.from_paths(list(forest.path(ends[tuple(trajectory)]))[::-1] for trajectory in trajectories)


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two trajectories have in common from their start."""
    size = min(len(one), len(other))
    differs = np.flatnonzero(np.asarray(one[:size]) != np.asarray(other[:size]))
    return int(differs[0]) if differs.size else size


@dataclass
class _Forest:
    """Runs of tokens, made from trajectories that come in lexicographic order."""

    parent: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)  # runs of the trajectory that came last, from its start to its end

    def add(self, tokens: Sequence[int], num_shared: int) -> int:
        """The run that these tokens end with; they share so many with the trajectory before. -1: there are no tokens."""
        below = -1
        while self._open and self.end[self._open[-1]] > num_shared:
            below = self._open.pop()
        if below >= 0 and self.start[below] < num_shared:
            upper = self._run(self.start[below], num_shared)
            self.parent[below], self.start[below] = upper, num_shared
        if len(tokens) > num_shared:
            self._run(num_shared, len(tokens))
        return self._open[-1] if self._open else -1

    def path(self, run: int) -> Iterator[tuple[int, float]]:
        """Key and cost of each run from this one up to its root."""
        while run >= 0:
            yield run, float(self.end[run] - self.start[run])
            run = self.parent[run]

    def _run(self, start: int, end: int) -> int:
        """A new run below the last open one."""
        self.parent.append(self._open[-1] if self._open else -1)
        self.start.append(start)
        self.end.append(end)
        self._open.append(len(self.parent) - 1)
        return self._open[-1]
