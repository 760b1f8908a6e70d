"""Bytes each kernel asks for, and the least any program could move: what a bench divides by, and a test counts.

`requested_bytes` counts every load and store of every program as if nothing were cached, so it is an upper bound of
the traffic to memory; `lower_bound_bytes` counts each input element read once and each output element written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sglang_ets.kernels.pairwise_cosine import BLOCK_N

INDEX_BYTES = 8  # int64 offsets and positions
FLOAT_BYTES = 4  # every output is float32


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch."""

    requested_bytes: int
    lower_bound_bytes: int


def step_pool_traffic(*, num_rows: int, hidden_size: int, num_segments: int, dtype: torch.dtype) -> Traffic:
    """Traffic of `step_pool` over segments which cover `num_rows` rows."""
    shared = num_rows * hidden_size * dtype.itemsize + num_segments * hidden_size * FLOAT_BYTES
    return Traffic(
        requested_bytes=shared + num_segments * 2 * INDEX_BYTES,
        lower_bound_bytes=shared + (num_segments + 1) * INDEX_BYTES,
    )


def step_score_traffic(
    *, num_positions: int, hidden_size: int, num_head_rows: int, dtype: torch.dtype, has_bias: bool
) -> Traffic:
    """Traffic of `step_score` with all `num_head_rows` rows in use (softmax), head and bias in hidden's dtype."""
    shared = num_positions * (hidden_size * dtype.itemsize + INDEX_BYTES + FLOAT_BYTES)
    head_bytes = num_head_rows * (hidden_size + (1 if has_bias else 0)) * dtype.itemsize
    return Traffic(
        requested_bytes=shared + num_positions * head_bytes,
        lower_bound_bytes=shared + head_bytes,
    )


def pairwise_cosine_traffic(*, num_rows: int, hidden_size: int, dtype: torch.dtype) -> Traffic:
    """Traffic of `pairwise_cosine`: each tile on or above the diagonal reads the rows of its two sides."""
    row_bytes = hidden_size * dtype.itemsize
    num_tiles = -(-num_rows // BLOCK_N)
    # Rows of tile k are read on the left of tiles k..last and on the right of tiles 0..k: one more than there are.
    rows_read = num_rows * (num_tiles + 1)
    output_bytes = num_rows * num_rows * FLOAT_BYTES
    return Traffic(
        requested_bytes=rows_read * row_bytes + output_bytes,
        lower_bound_bytes=num_rows * row_bytes + output_bytes,
    )


def paged_attention_traffic(
    *,
    kv_tokens_read: int,  # `Layout.kv_tokens_read`
    kv_tokens_distinct: int,
    num_tokens: int,  # new ones
    num_heads: int,
    num_kv_heads: int,
    head_size: int,  # of keys and of values
    dtype: torch.dtype,  # of the pools
) -> Traffic:
    """Traffic of one layer of `paged_attention`: keys and values, queries and outputs (float32 in the kernel)."""
    token_bytes = 2 * num_kv_heads * head_size * dtype.itemsize
    own = 2 * num_tokens * num_heads * head_size * FLOAT_BYTES
    return Traffic(
        requested_bytes=kv_tokens_read * token_bytes + own,
        lower_bound_bytes=kv_tokens_distinct * token_bytes + own,
    )
