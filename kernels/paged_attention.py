"""Causal attention of new tokens over a paged KV cache, on the CPU.

A search decodes hundreds of short rows at once. A loop of torch calls over them spends its time between the calls, and
padding them to one length moves more memory than it reads. The Numba kernel of `attention_tiles` goes over the rows' pages in
place; given a plan, it reads what several rows share once for all of them.

What else is in a batch, and the plan, never change a result: a row's bits depend on its own query, keys and values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sglang_ets.kernels.attention_tiles import SIZE_MULTIPLE, TOKENS_AT_ONCE, attend
from torch.nn.functional import scaled_dot_product_attention

FEW_NEW_TOKENS = 64  # of a sequence; with more, torch's blocked attention of one sequence is about as fast
# Numba knows no bfloat16 and computes nothing in float16: it is given their bits, and tells them apart by the type.
BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


class SharedKV(Protocol):
    """Which sequences of a batch have the same KV where; `core.attention_plan.AttentionPlan` is one.

    It speaks of cached tokens: segments end before the new ones.
    """

    @property
    def order(self) -> NDArray[np.int64]:
        """[sequences]: all of them, such that those of a segment lie side by side."""

    @property
    def spans(self) -> NDArray[np.int64]:
        """[segments, 4]: positions start to end, shared by places first to last of `order`; no gaps in a sequence."""

    @property
    def private_from(self) -> NDArray[np.int64]:
        """[sequences]: the position from which on a sequence is in no segment."""


@dataclass(frozen=True)
class Layout:
    """The new tokens of a batch in the order in which the kernel goes over them. Made by `layout_of`."""

    tokens: NDArray[np.int64]  # [tokens], place in the batch of each
    rows: NDArray[np.int64]  # [tokens], row of req_to_token
    visible: NDArray[np.int64]  # [tokens], positions that the token sees
    segments: NDArray[np.int64]  # [segments, 4]: positions start to end of tokens first to last

    @property
    def kv_tokens_read(self) -> int:
        """Keys (and as many values) that one layer reads in one thread: a segment once for each pass that it is in."""
        start, end, first, last = self.segments.T
        return int(((end - start) * ((last - 1) // TOKENS_AT_ONCE - first // TOKENS_AT_ONCE + 1)).sum())


def layout_of(
    rows: Sequence[int], kv_lengths: Sequence[int], new_lengths: Sequence[int], plan: SharedKV | None = None
) -> Layout:
    """What the kernel follows: one for all layers of a forward pass. Arguments as in `PagedBatch`.

    Raises:
        ValueError: the plan is of another batch, or shares what is new.
    """
    row, num_kv = np.asarray(rows, dtype=np.int64), np.asarray(kv_lengths, dtype=np.int64)
    is_planned = plan is not None and len(plan.spans) > 0
    if not is_planned and max(new_lengths) == 1:  # the usual decode
        place = np.arange(len(row))
        return Layout(place, row, num_kv, np.stack([np.zeros_like(place), num_kv, place, place + 1], axis=1))
    num_new = np.asarray(new_lengths, dtype=np.int64)
    num_cached, starts = num_kv - num_new, np.cumsum(num_new) - num_new
    order, private_from, spans = np.arange(len(row)), np.zeros_like(row), np.empty((0, 4), dtype=np.int64)
    if plan is not None and is_planned:
        order, private_from, spans = plan.order, plan.private_from, plan.spans
        _check(plan, num_cached)
    num_new, num_cached, private_from = num_new[order], num_cached[order], private_from[order]
    bounds = np.concatenate([[0], np.cumsum(num_new)])
    sequence = np.repeat(np.arange(len(row)), num_new)
    number = np.arange(len(sequence)) - bounds[sequence]  # of a token among the new ones of its sequence
    visible = num_cached[sequence] + number + 1
    shared = np.concatenate([spans[:, :2], bounds[spans[:, 2:]]], axis=1)
    # What is cached and the first new token are seen by all new tokens of a sequence; the rest depends on the token.
    whole = np.stack([private_from, num_cached + 1, bounds[:-1], bounds[1:]], axis=1)
    later = np.flatnonzero(number)
    tails = np.stack([num_cached[sequence[later]] + 1, visible[later], later, later + 1], axis=1)
    segments = np.concatenate([shared, whole, tails])
    return Layout(starts[order][sequence] + number, row[order][sequence], visible, segments)


def _check(plan: SharedKV, num_cached: NDArray[np.int64]) -> None:
    if len(plan.order) != len(num_cached):
        raise ValueError(f"the plan is of {len(plan.order)} sequences, but the batch has {len(num_cached)}")
    if (plan.private_from > num_cached).any():
        at = int((plan.private_from - num_cached).argmax())
        raise ValueError(
            f"the plan shares {plan.private_from[at]} tokens of sequence {at}, but only {num_cached[at]} are cached"
        )


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
    layout: Layout | None = None  # of these rows and lengths; None: made for this call, without a plan

    def sequences(self) -> Iterator[PagedBatch]:
        """One batch a sequence."""
        start = 0
        for row, num_kv, num_new in zip(self.rows, self.kv_lengths, self.new_lengths, strict=True):
            query, output = (one[start : start + num_new] for one in (self.query, self.output))
            yield replace(
                self, query=query, output=output, rows=[row], kv_lengths=[num_kv], new_lengths=[num_new], layout=None
            )
            start += num_new


def paged_attention_reference(batch: PagedBatch) -> None:
    """Each sequence's new tokens over all before them and themselves; one torch call a sequence."""
    for one in batch.sequences():
        _attend_sequence(one)


def slow_path_reason(batch: PagedBatch) -> str | None:
    """Why `paged_attention` leaves a batch of this kind to `paged_attention_reference`, as a clause; None if it does not."""
    floats = {"query": batch.query, "output": batch.output, "key pool": batch.k_cache, "value pool": batch.v_cache}
    for name, tensor in floats.items():
        if tensor.device.type != "cpu":
            return f"the {name} is on {tensor.device}; the kernel reads memory of the CPU"
        if tensor.dtype not in BITS:
            return f"the {name} is {_name(tensor.dtype)}; the kernel takes {', '.join(map(_name, BITS))}"
        if tensor.shape[-1] % SIZE_MULTIPLE:
            return f"the head size of the {name} is {tensor.shape[-1]}; the kernel takes multiples of {SIZE_MULTIPLE}"
    if batch.k_cache.dtype != batch.v_cache.dtype:
        names = _name(batch.k_cache.dtype), _name(batch.v_cache.dtype)
        return f"the key pool is {names[0]} and the value pool {names[1]}; the kernel takes one dtype"
    if not (batch.k_cache.is_contiguous() and batch.v_cache.is_contiguous()):
        return "a pool is not contiguous"
    if batch.req_to_token.dtype != torch.int32:
        return f"the slots are {_name(batch.req_to_token.dtype)}; the kernel takes int32"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def paged_attention(batch: PagedBatch) -> None:
    """`paged_attention_reference`, by the Numba kernel where that can (`slow_path_reason`) and is faster: few new tokens.

    With a plan in the layout, the same bits are written as without.
    """
    if slow_path_reason(batch) is not None:
        paged_attention_reference(batch)
    elif max(batch.new_lengths) <= FEW_NEW_TOKENS:
        _attend_few(batch)
    else:
        for one in batch.sequences():
            run = _attend_few if one.new_lengths[0] <= FEW_NEW_TOKENS else _attend_sequence
            run(one)


def _attend_few(batch: PagedBatch) -> None:
    layout = batch.layout or layout_of(batch.rows, batch.kv_lengths, batch.new_lengths)
    scaling = 1 / math.sqrt(batch.query.shape[2]) if batch.scaling is None else batch.scaling
    query = (batch.query.float() * scaling).contiguous()
    is_direct = batch.output.dtype == torch.float32 and batch.output.is_contiguous()
    output = batch.output if is_direct else torch.empty(batch.output.shape, dtype=torch.float32)
    pools = [pool.view(BITS[pool.dtype]) for pool in (batch.k_cache, batch.v_cache)]
    arrays = [tensor.numpy() for tensor in (query, output, *pools, batch.req_to_token)]

    def attend_part(part: slice) -> None:
        segments = layout.segments
        if part.stop - part.start < len(query):
            within = segments[:, 2:].clip(part.start, part.stop) - part.start
            segments = np.concatenate([segments[:, :2], within], axis=1)[within[:, 0] < within[:, 1]]
        attend(*arrays, layout.tokens[part], layout.rows[part], layout.visible[part], segments)

    _in_threads(attend_part, len(query))
    if not is_direct:
        batch.output.copy_(output)


def _in_threads(attend: Callable[[slice], None], num_tokens: int) -> None:
    """Over all tokens, in as many threads as torch uses: the kernel does not hold the interpreter's lock."""
    num_threads = min(torch.get_num_threads(), num_tokens)
    if num_threads == 1:
        return attend(slice(0, num_tokens))
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
