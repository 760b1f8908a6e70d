"""What a search may still generate: a hard limit on the tokens of all its trajectories together."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.tree import Node

UNSEEN = 3.0  # what a leaf is expected to become, in its own length, before any trajectory is complete


class TokenBudget:
    """`max_total_tokens` of a search and what is spent of it; without one, nothing is limited.

    The limit holds because a level's steps get equal shares of what is left. The width narrows before that hurts: to as many
    trajectories as what is left can probably bring to their end.
    """

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._limit = limit = config.max_total_tokens
        self.spent_tokens = 0  # written by the search
        # A trajectory is expected to need one step of full length at least.
        least = min(config.max_step_tokens, config.max_tokens)
        self.width_at_start = config.width if limit is None else max(1, min(config.width, limit // least))
        # Where trajectories grow independently of each other, each has its share from the start on.
        self.longest_trajectory = (
            config.max_tokens if limit is None else min(config.max_tokens, limit // self.width_at_start)
        )

    @property
    def _left(self) -> int | None:
        return None if self._limit is None else max(0, self._limit - self.spent_tokens)

    def affordable(self, leaves: Sequence[Node], complete: Sequence[Node]) -> int:
        """How many trajectories can probably be grown to their end from these leaves; 0: not a token is left.

        A leaf is expected to become as long as the complete trajectories are; where there is none, `UNSEEN` times as long as it
        is.
        """
        if self._left is None:
            return self._config.width
        length = fmean(leaf.trajectory_tokens for leaf in leaves)
        whole = fmean(node.trajectory_tokens for node in complete) if complete else UNSEEN * length
        a_step = length / fmean(leaf.depth for leaf in leaves)
        rest = max(1.0, min(max(whole - length, a_step), self._config.max_tokens - length))
        return min(self._left, max(1, int(self._left / rest)))

    def share(self, width: int) -> int:
        """Tokens that each of `width` steps may have: at least 1 if `width` was affordable."""
        return self._config.max_step_tokens if self._left is None else self._left // width
