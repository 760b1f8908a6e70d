"""Causal attention of new tokens over a paged KV cache, on the CPU.

A search decodes hundreds of short rows at once. A loop of torch calls over them spends its time between the calls, and
padding them to one length moves more memory than it reads. The Numba kernel goes over the rows' pages in place. Rows do not
touch each other, so what else is in a batch never changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

FEW_NEW_TOKENS = 16  # from here on torch's blocked attention of one sequence is faster than row by row
TOKENS_AT_ONCE, POSITIONS_AT_ONCE = 16, 8
_REORDERING = {"reassoc", "contract", "arcp", "nsz"}  # lets sums be vectorised; infinities and NaN keep their meaning


@dataclass(frozen=True)
class PagedBatch:
    """New tokens of several sequences, whose keys and values are in the pools already. `output` is written."""

    query: torch.Tensor  # [tokens, heads, head_size], the new tokens of all sequences
    output: torch.Tensor  # [tokens, heads, value_size]
    k_cache: torch.Tensor  # [pool, kv_heads, head_size]
    v_cache: torch.Tensor  # [pool, kv_heads, value_size]
    req_to_token: torch.Tensor  # int[requests, context]: pool slot of each position
    rows: list[int]  # row of req_to_token of each sequence
    kv_lengths: list[int]  # cached and new tokens of each sequence; the new ones are the last
    new_lengths: list[int]  # new tokens of each sequence
    scaling: float | None = None  # of the scores; default 1 / sqrt(head_size)

    @property
    def is_supported(self) -> bool:
        """Whether the Numba kernel takes it: float32 on the CPU, int32 slots."""
        floats = (self.query, self.output, self.k_cache, self.v_cache)
        is_float32 = all(one.dtype == torch.float32 and one.device.type == "cpu" for one in floats)
        return is_float32 and self.req_to_token.dtype == torch.int32

    def sequences(self) -> Iterator[PagedBatch]:
        """One batch a sequence."""
        start = 0
        for row, num_kv, num_new in zip(self.rows, self.kv_lengths, self.new_lengths, strict=True):
            query, output = (one[start : start + num_new] for one in (self.query, self.output))
            yield replace(self, query=query, output=output, rows=[row], kv_lengths=[num_kv], new_lengths=[num_new])
            start += num_new


def paged_attention_reference(batch: PagedBatch) -> None:
    """Each sequence's new tokens over all before them and themselves; one torch call a sequence."""
    for one in batch.sequences():
        _attend_sequence(one)


def paged_attention(batch: PagedBatch) -> None:
    """`paged_attention_reference`, by the Numba kernel where that is faster and can: float32, few new tokens a sequence."""
    if not batch.is_supported:
        paged_attention_reference(batch)
    elif max(batch.new_lengths) <= FEW_NEW_TOKENS:
        _attend_few(batch)
    else:
        for one in batch.sequences():
            attend = _attend_few if one.new_lengths[0] <= FEW_NEW_TOKENS else _attend_sequence
            attend(one)


def _attend_few(batch: PagedBatch) -> None:
    num_kv = np.asarray(batch.kv_lengths, dtype=np.int64)
    num_new = np.asarray(batch.new_lengths, dtype=np.int64)
    sequence = np.repeat(np.arange(len(num_new)), num_new)
    # The j-th new token of a sequence sees its cached tokens and the first j new ones.
    order = np.arange(len(sequence)) - np.repeat(np.cumsum(num_new) - num_new, num_new)
    visible = (num_kv - num_new)[sequence] + order + 1
    scale = np.float32(1 / math.sqrt(batch.query.shape[2]) if batch.scaling is None else batch.scaling)
    caches = (batch.k_cache.numpy(), batch.v_cache.numpy(), batch.req_to_token.numpy())
    token_rows = np.asarray(batch.rows, dtype=np.int64)[sequence]

    def attend(part: slice) -> None:
        query, output = batch.query[part].numpy(), batch.output[part].numpy()
        _attend_rows(query, output, *caches, token_rows[part], visible[part], scale)

    _in_threads(attend, len(batch.query))


def _in_threads(attend: Callable[[slice], None], num_tokens: int) -> None:
    """Over all tokens, in as many threads as torch uses: the kernel does not hold the interpreter's lock."""
    num_threads = min(torch.get_num_threads(), num_tokens)
    if num_threads == 1:
        return attend(slice(None))
    bounds = [num_tokens * at // num_threads for at in range(num_threads + 1)]
    parts = map(slice, bounds, bounds[1:])
    for _ in _threads(torch.get_num_threads()).map(attend, parts):
        pass  # raises what a thread has raised
    return None


@cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="paged-attention")


def _attend_sequence(batch: PagedBatch) -> None:
    [row], [num_kv], [num_new] = batch.rows, batch.kv_lengths, batch.new_lengths
    query, slots = batch.query, batch.req_to_token[row, :num_kv]
    mask = None
    if 1 < num_new < num_kv:
        # bool[new, kv]: new token i sees the prefix and the new tokens up to itself.
        mask = torch.ones(num_new, num_kv, dtype=torch.bool, device=query.device).tril(num_kv - num_new)
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        batch.k_cache[slots].transpose(0, 1).unsqueeze(0).to(query.dtype),
        batch.v_cache[slots].transpose(0, 1).unsqueeze(0).to(query.dtype),
        attn_mask=mask,
        is_causal=num_new == num_kv > 1,  # a single new token sees everything before it
        scale=batch.scaling,
        enable_gqa=query.shape[1] != batch.k_cache.shape[1],
    )
    batch.output.copy_(out.squeeze(0).transpose(0, 1))


@numba.njit(cache=True, nogil=True, fastmath=_REORDERING, error_model="numpy")
def _softmax(scores: NDArray[np.float32]) -> None:
    largest = scores[0]
    for at in range(scores.shape[0]):
        largest = max(largest, scores[at])
    total = np.float32(0)
    for at in range(scores.shape[0]):
        scores[at] = np.exp(scores[at] - largest)
        total += scores[at]
    for at in range(scores.shape[0]):
        scores[at] /= total


@numba.njit(cache=True, nogil=True, fastmath=_REORDERING, error_model="numpy")
def _attend_rows(
    query: NDArray[np.float32],  # [tokens, heads, head_size]
    output: NDArray[np.float32],  # [tokens, heads, value_size], written
    k_cache: NDArray[np.float32],  # [pool, kv_heads, head_size]
    v_cache: NDArray[np.float32],  # [pool, kv_heads, value_size]
    slots: NDArray[np.int32],  # [requests, context]
    rows: NDArray[np.int64],  # [tokens], row of `slots` of each token's sequence
    visible: NDArray[np.int64],  # [tokens], how many positions of it the token sees
    scaling: np.float32,
) -> None:
    """Goes over the same positions of several tokens before the next ones: siblings share slots, and what rows decode in
    one batch lies side by side in the pool.
    """
    num_heads = query.shape[1]
    weights = np.empty((TOKENS_AT_ONCE, num_heads, visible.max()), dtype=np.float32)
    for first in range(0, query.shape[0], TOKENS_AT_ONCE):
        last = min(first + TOKENS_AT_ONCE, query.shape[0])
        longest = visible[first:last].max()
        for start in range(0, longest, POSITIONS_AT_ONCE):
            for token in range(first, last):
                end = min(start + POSITIONS_AT_ONCE, visible[token])  # before `start` where the token sees no more
                _score(query[token], k_cache, slots[rows[token]], weights[token - first], start, end, scaling)
        for token in range(first, last):
            for head in range(num_heads):
                _softmax(weights[token - first, head, : visible[token]])
                output[token, head] = 0
        for start in range(0, longest, POSITIONS_AT_ONCE):
            for token in range(first, last):
                end = min(start + POSITIONS_AT_ONCE, visible[token])
                _add_values(output[token], v_cache, slots[rows[token]], weights[token - first], start, end)


@numba.njit(cache=True, nogil=True, fastmath=_REORDERING, error_model="numpy")
def _score(
    query: NDArray[np.float32],  # [heads, head_size] of one token
    k_cache: NDArray[np.float32],
    page: NDArray[np.int32],  # [context]
    scores: NDArray[np.float32],  # [heads, positions], written from `start` to `end`
    start: int,
    end: int,
    scaling: np.float32,
) -> None:
    group = query.shape[0] // k_cache.shape[1]  # query heads that share a key head
    for position in range(start, end):
        slot = np.uint32(page[position])  # unsigned: Numba need not look for negative indices
        for kv_head in range(k_cache.shape[1]):
            k = k_cache[slot, kv_head]
            for head in range(kv_head * group, (kv_head + 1) * group):
                q = query[head]
                score = np.float32(0)
                for at in range(q.shape[0]):
                    score += q[at] * k[at]
                scores[head, position] = score * scaling


@numba.njit(cache=True, nogil=True, fastmath=_REORDERING, error_model="numpy")
def _add_values(
    output: NDArray[np.float32],  # [heads, value_size] of one token, added to
    v_cache: NDArray[np.float32],
    page: NDArray[np.int32],  # [context]
    weights: NDArray[np.float32],  # [heads, positions]
    start: int,
    end: int,
) -> None:
    """Four positions at a time, so that the output is read and written a quarter as often."""
    group = output.shape[0] // v_cache.shape[1]
    whole = start + max(end - start, 0) // 4 * 4
    for position in range(start, whole, 4):
        a, b = np.uint32(page[position]), np.uint32(page[position + 1])
        c, d = np.uint32(page[position + 2]), np.uint32(page[position + 3])
        for head in range(output.shape[0]):
            kv_head = head // group
            out, w = output[head], weights[head, position : position + 4]
            v0, v1, v2, v3 = v_cache[a, kv_head], v_cache[b, kv_head], v_cache[c, kv_head], v_cache[d, kv_head]
            w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
            for at in range(out.shape[0]):
                out[at] += w0 * v0[at] + w1 * v1[at] + w2 * v2[at] + w3 * v3[at]
    for position in range(whole, end):
        slot = np.uint32(page[position])
        for head in range(output.shape[0]):
            out, v, weight = output[head], v_cache[slot, head // group], weights[head, position]
            for at in range(out.shape[0]):
                out[at] += weight * v[at]
