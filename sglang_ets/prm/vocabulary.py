"""The language model head as one table of rows, also where tensor-parallel ranks have a part of it each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Vocabulary:
    """Rows and logits of all V tokens. With several ranks, each call is a collective one."""

    def __init__(self, head: Any, size: int, group: Any = None) -> None:
        """`head`: sglang's layer; `size`: V; `group`: of the ranks that share the rows, None if they are all here."""
        self._head = head
        self._size = size
        self._group = group

    def logits(self, states: torch.Tensor) -> torch.Tensor:  # float[n, H] -> float[n, V]
        """All logits, in the model's own number type."""
        own = states @ self._head.weight.T
        whole = own if self._group is None else self._group.all_gather(own, dim=-1)
        # sglang pads the head to a multiple of 64 rows; a padding row is zero, and its exp(0) would count in the softmax.
        logits: torch.Tensor = whole[:, : self._size]
        return logits

    def rows(self, token_ids: Sequence[int]) -> torch.Tensor:  # float[k, H]
        """The rows of these tokens."""
        weight: torch.Tensor = self._head.weight
        if self._group is None:
            return torch.stack([weight[token] for token in token_ids])
        first, end = self._head.shard_indices.org_vocab_start_index, self._head.shard_indices.org_vocab_end_index
        elsewhere = weight.new_zeros(weight.shape[1])
        own = torch.stack([weight[token - first] if first <= token < end else elsewhere for token in token_ids])
        whole: torch.Tensor = self._group.all_reduce(own)
        return whole
