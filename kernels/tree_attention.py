"""Attention of a decode batch over KV that several rows share: each shared stretch is read once for all of them.

Two kernels, and a host function that cuts a plan into their work. `shared_partials` writes one partial result for each row,
head and piece of a shared stretch; whoever computes the private rest of a row writes its partial results into the same
buffers; `merge_partials` reduces all of them to the output and leaves the buffers empty for the next layer.

Everything on the device has a fixed size, and work that does not exist ends at once, so a CUDA graph can hold both launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from sglang_ets.kernels.dispatch import INTERPRETED, Backend, LaunchConfig, choose_backend

ITEM_FIELDS = (
    5  # of one piece of work: first and last position, first place in `order`, rows, slot of its partial result
)
ITEMS_PER_ROW = 4  # no plan of a batch needs more, see `work_items`
MAX_SHARED_SLOTS = 16  # that a batch has for shared stretches: four segments in four pieces each
MAX_SPLITS = 4  # pieces of one segment, so that a long prompt alone keeps more than one program per head busy
MIN_SPLIT_TOKENS = 128  # of such a piece
# Query rows of one program: rows of the batch times the query heads of a KV head. Float32 is split in three: more would spill.
TILE_ROWS = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}
BLOCK_N = 32  # keys of one turn; more would spill
NUM_WARPS = 8
EMPTY = -float("inf")  # log-sum-exp of a slot that holds no partial result


def max_group(dtype: torch.dtype) -> int:
    """Query heads of a KV head, at most; with more, a program would serve one row and share nothing."""
    return TILE_ROWS[dtype] // 2


@dataclass(frozen=True)
class Partials:
    """Buffers of partial results; a slot whose `lse` is minus infinity holds none."""

    out: torch.Tensor  # float32 [rows, heads, slots, value size], contiguous
    lse: torch.Tensor  # float32 [rows, heads, slots], contiguous

    @classmethod
    def empty(cls, num_rows: int, num_heads: int, num_slots: int, value_size: int, device: torch.device) -> Partials:
        """New buffers without a result."""
        shape = (num_rows, num_heads, num_slots)
        out = torch.zeros(*shape, value_size, dtype=torch.float32, device=device)
        return cls(out, torch.full(shape, EMPTY, dtype=torch.float32, device=device))


def work_items(
    spans: NDArray[np.int64],  # [segments, 4]: start, end, first and last place in the order of rows; depth first
    *,
    num_rows: int,
    tile: int,  # rows of one item at most: TILE_ROWS over the query heads of a KV head; two or more
    first_slot: int,  # slots before it belong to the private rest of a row
    num_slots: int,
) -> NDArray[np.int32]:  # [items, ITEM_FIELDS], at most ITEMS_PER_ROW * num_rows
    """Cut the segments of a plan into pieces of work: some rows, some positions, one slot.

    Segments of one row get slots one after the other. Long segments are split as far as slots and items allow.

    Raises:
        ValueError: a row has more segments than there are slots.
    """
    for splits in range(min(MAX_SPLITS, num_slots), 0, -1):
        items = _cut(spans, tile, splits, first_slot)
        if len(items) <= ITEMS_PER_ROW * num_rows and _last_slot(items) < first_slot + num_slots:
            return np.array(items, dtype=np.int32).reshape(-1, ITEM_FIELDS)
    # A tile holds two rows or more, so segments of a row, up to four, need at most 8/3 items for each of the rows.
    raise ValueError(f"the plan has {len(items)} items up to slot {_last_slot(items)}; expected at most "
                     f"{ITEMS_PER_ROW * num_rows} in slots {first_slot} to {first_slot + num_slots - 1}")  # fmt: skip


def _last_slot(items: list[tuple[int, int, int, int, int]]) -> int:
    return max((item[-1] for item in items), default=-1)


def _cut(spans: NDArray[np.int64], tile: int, max_splits: int, first_slot: int) -> list[tuple[int, int, int, int, int]]:
    items = []
    above: list[tuple[int, int]] = []  # of the segments around this one: last place, first slot behind them
    for start, end, first, last in spans.tolist():
        while above and above[-1][0] <= first:
            above.pop()
        slot = above[-1][1] if above else first_slot
        num_splits = min(max_splits, -(-(end - start) // MIN_SPLIT_TOKENS))
        length = -(-(end - start) // num_splits)
        pieces = [(at, min(at + length, end)) for at in range(start, end, length)]
        for number, (low, high) in enumerate(pieces):
            items += [(low, high, at, min(tile, last - at), slot + number) for at in range(first, last, tile)]
        above.append((last, slot + len(pieces)))
    return items


@dataclass(frozen=True)
class SharedWork:
    """What `shared_partials` reads and writes."""

    query: torch.Tensor  # float32 | float16 | bfloat16 [rows, heads, head size], rows contiguous
    keys: torch.Tensor  # same dtype [slots of the pool, KV heads, head size], slots contiguous
    values: torch.Tensor  # same dtype [slots of the pool, KV heads, value size], slots contiguous
    page_table: torch.Tensor  # int32 [requests, positions], slot of the pool
    table_rows: torch.Tensor  # int [rows], row in the page table
    items: torch.Tensor  # int32 [items, ITEM_FIELDS]; an item that ends where it starts is none
    order: torch.Tensor  # int32 [rows]
    partials: Partials  # written, in the slots that the items name
    scale: float


def shared_partials_reference(work: SharedWork) -> None:
    """The specification of `shared_partials` in plain torch."""
    group = work.query.shape[1] // work.keys.shape[1]
    for start, end, first, count, slot in work.items.tolist():
        if start >= end:
            continue
        rows = work.order[first : first + count].long()
        slots = work.page_table[work.table_rows[rows[0]], start:end].long()
        key, value = (cache[slots].float().repeat_interleave(group, dim=1) for cache in (work.keys, work.values))
        scores = torch.einsum("rhd,nhd->rhn", work.query[rows].float(), key) * work.scale
        work.partials.out[rows, :, slot] = torch.einsum("rhn,nhd->rhd", scores.softmax(-1), value)
        work.partials.lse[rows, :, slot] = scores.logsumexp(-1)


@triton.jit
def attend_to_pages(
    query: tl.tensor,  # [BLOCK_M, BLOCK_D]
    pages_ptr: tl.tensor,  # int32, slot of each position
    keys_ptr: tl.tensor,  # of this KV head
    values_ptr: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    stride_keys_slot: tl.tensor,
    stride_values_slot: tl.tensor,
    scale: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Attention of all query rows to positions `start` to `end`, and its log-sum-exp."""
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for at in range(start, end, BLOCK_N):
        positions = at + tl.arange(0, BLOCK_N)
        mask = positions < end
        pages = tl.load(pages_ptr + positions, mask=mask, other=0).to(tl.int64)
        key_ptrs = keys_ptr + pages[None, :] * stride_keys_slot + dims[:, None]
        keys = tl.load(key_ptrs, mask=mask[None, :] & (dims < HEAD_SIZE)[:, None], other=0.0)
        value_ptrs = values_ptr + pages[:, None] * stride_values_slot + value_dims[None, :]
        values = tl.load(value_ptrs, mask=mask[:, None] & (value_dims < VALUE_SIZE)[None, :], other=0.0)
        scores = multiply(query, keys, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), DOT_IN_FLOAT32)
        scores = tl.where(mask[None, :], scores * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = multiply(weights.to(values.dtype), values, acc * shrink[:, None], DOT_IN_FLOAT32)
        top = new_top
    return acc / total[:, None], top + tl.log(total)


@triton.jit
def multiply(left: tl.tensor, right: tl.tensor, acc: tl.tensor, DOT_IN_FLOAT32: tl.constexpr) -> tl.tensor:
    if DOT_IN_FLOAT32:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="tf32x3")


@triton.jit
def shared_partials_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    items_ptr: tl.tensor,
    order_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    stride_query_row: tl.tensor,
    stride_keys_slot: tl.tensor,
    stride_values_slot: tl.tensor,
    stride_table_row: tl.tensor,
    num_slots: tl.tensor,
    ITEM_FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
) -> None:
    item_ptr, kv_head = items_ptr + tl.program_id(0) * ITEM_FIELDS, tl.program_id(1)
    start, end = tl.load(item_ptr), tl.load(item_ptr + 1)
    if start >= end:
        return
    first, count, slot = tl.load(item_ptr + 2), tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    lanes, dims, value_dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    mask = lanes // GROUP < count
    rows = tl.load(order_ptr + first + lanes // GROUP, mask=mask, other=0).to(tl.int64)
    heads = kv_head * GROUP + lanes % GROUP
    query_ptrs = query_ptr + rows[:, None] * stride_query_row + heads[:, None] * HEAD_SIZE + dims[None, :]
    query = tl.load(query_ptrs, mask=mask[:, None] & (dims < HEAD_SIZE)[None, :], other=0.0)
    table_row = tl.load(table_rows_ptr + tl.load(order_ptr + first)).to(tl.int64)
    attended, lse = attend_to_pages(
        query, page_table_ptr + table_row * stride_table_row, keys_ptr + kv_head * HEAD_SIZE, values_ptr + kv_head * VALUE_SIZE,
        start, end, stride_keys_slot, stride_values_slot, scale,
        HEAD_SIZE, VALUE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, DOT_IN_FLOAT32,
    )  # fmt: skip
    places = (rows * tl.num_programs(1) * GROUP + heads) * num_slots + slot
    out_mask = mask[:, None] & (value_dims < VALUE_SIZE)[None, :]
    tl.store(out_ptr + places[:, None] * VALUE_SIZE + value_dims[None, :], attended, mask=out_mask)
    tl.store(lse_ptr + places, lse, mask=mask)


def shared_config(dtype: torch.dtype, group: int, head_size: int, value_size: int) -> LaunchConfig:
    """Compile-time settings: a tile of query rows against blocks of keys."""
    constants = {
        "ITEM_FIELDS": ITEM_FIELDS,
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "VALUE_SIZE": value_size,
        "BLOCK_M": TILE_ROWS[dtype],
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_size)),
        # The interpreter's tl.dot multiplies the bit patterns of bfloat16 (triton issue 11584); a real GPU never casts.
        "DOT_IN_FLOAT32": INTERPRETED and dtype == torch.bfloat16,
    }
    return LaunchConfig(constants=constants, num_warps=NUM_WARPS, num_stages=1 if dtype == torch.float32 else 2)


def shared_partials(work: SharedWork, *, backend: Backend | None = None) -> None:
    """Attention of rows to the stretches that they share: one partial result for each item, row and head.

    Writes the slots that the items name and no others. Does not synchronise. Indices on the device are not checked.

    Raises: ValueError for shapes or dtypes that do not go together.
    """
    _check(work)
    if choose_backend(work.query.device, backend) == "reference":
        shared_partials_reference(work)
    elif len(work.items) > 0:
        _launch(work)


def _launch(work: SharedWork) -> None:
    num_kv_heads = work.keys.shape[1]
    config = shared_config(
        work.query.dtype, work.query.shape[1] // num_kv_heads, work.keys.shape[2], work.values.shape[2]
    )
    shared_partials_kernel[(len(work.items), num_kv_heads)](
        work.query,
        work.keys,
        work.values,
        work.page_table,
        work.table_rows,
        work.items,
        work.order,
        work.partials.out,
        work.partials.lse,
        work.scale,
        work.query.stride(0),
        work.keys.stride(0),
        work.values.stride(0),
        work.page_table.stride(0),
        work.partials.lse.shape[2],
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _check(work: SharedWork) -> None:
    query, keys, values, partials = work.query, work.keys, work.values, work.partials
    if query.ndim != 3 or keys.ndim != 3 or values.ndim != 3 or query.shape[2] != keys.shape[2]:
        raise ValueError(
            f"query, keys and values must be [., heads, size] with one size of query and key, got {tuple(query.shape)}, "
            f"{tuple(keys.shape)} and {tuple(values.shape)}: reshape them"
        )
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"query, keys and values must have one dtype, got {query.dtype}, {keys.dtype} and {values.dtype}: cast them"
        )
    if any(tensor.stride()[1:] != (tensor.shape[2], 1) for tensor in (query, keys, values)):
        raise ValueError("each row of query, keys and values must be contiguous: call contiguous()")
    num_heads, num_kv_heads = query.shape[1], keys.shape[1]
    if num_heads % num_kv_heads or num_heads // num_kv_heads > max_group(query.dtype):
        raise ValueError(
            f"every KV head must serve the same 1 to {max_group(query.dtype)} query heads in {query.dtype}, "
            f"got {num_heads} and {num_kv_heads} heads: leave such a model to the stock kernels"
        )
    if len(partials.lse) < len(query) or partials.lse.shape[1] != num_heads or partials.out.shape[3] != values.shape[2]:
        raise ValueError(
            f"partial results must be [>= {len(query)}, {num_heads}, slots, {values.shape[2]}], got "
            f"{tuple(partials.out.shape)}: allocate them for this batch and model"
        )


def merge_partials_reference(partials: Partials, output: torch.Tensor) -> None:
    """The specification of `merge_partials` in plain torch."""
    lse = partials.lse[: len(output)]
    weights = lse.softmax(-1).unsqueeze(-1)
    parts = torch.where(weights > 0, partials.out[: len(output)], 0.0)
    output.copy_((weights * parts).sum(2))
    lse.fill_(EMPTY)


@triton.jit
def merge_partials_kernel(
    out_ptr: tl.tensor,  # float32 [rows, heads, NUM_SLOTS, VALUE_SIZE]
    lse_ptr: tl.tensor,  # float32 [rows, heads, NUM_SLOTS]
    output_ptr: tl.tensor,  # float [rows, heads, VALUE_SIZE]
    num_heads: tl.tensor,
    stride_output_row: tl.tensor,
    stride_output_head: tl.tensor,
    NUM_SLOTS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slots, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    places = (row * num_heads + head) * NUM_SLOTS + slots
    lse = tl.load(lse_ptr + places, mask=slots < NUM_SLOTS, other=-float("inf"))
    is_full = lse > -float("inf")
    weights = tl.exp(lse - tl.max(lse, axis=0))
    parts = tl.load(
        out_ptr + places[:, None] * VALUE_SIZE + dims[None, :],
        mask=is_full[:, None] & (dims < VALUE_SIZE)[None, :],
        other=0.0,
    )
    merged = tl.sum(weights[:, None] * parts, axis=0) / tl.sum(weights, axis=0)
    tl.store(output_ptr + row * stride_output_row + head * stride_output_head + dims, merged, mask=dims < VALUE_SIZE)
    tl.store(lse_ptr + places, tl.full([BLOCK_S], -float("inf"), dtype=tl.float32), mask=slots < NUM_SLOTS)


def merge_config(num_slots: int, value_size: int) -> LaunchConfig:
    """Compile-time settings: one program per row and head holds all its partial results."""
    constants = {
        "NUM_SLOTS": num_slots,
        "VALUE_SIZE": value_size,
        "BLOCK_S": triton.next_power_of_2(num_slots),
        "BLOCK_V": triton.next_power_of_2(value_size),
    }
    return LaunchConfig(constants=constants, num_warps=4, num_stages=1)


def merge_partials(
    partials: Partials,  # read, and left empty
    output: torch.Tensor,  # float [rows, heads, value size], written
    *,
    backend: Backend | None = None,
) -> None:
    """The output of each row and head from its partial results, at least one of which there must be; no synchronisation.

    Rows of the buffers beyond those of `output` stay as they are.

    Raises: ValueError for shapes that do not go together.
    """
    if output.ndim != 3 or output.stride(2) != 1 or len(partials.lse) < len(output):
        raise ValueError(
            f"output must be [rows, heads, value size] with contiguous values and at most {len(partials.lse)} rows, got "
            f"{tuple(output.shape)} with strides {output.stride()}: allocate the buffers for this batch"
        )
    if choose_backend(output.device, backend) == "reference":
        merge_partials_reference(partials, output)
        return
    config = merge_config(partials.lse.shape[2], partials.out.shape[3])
    merge_partials_kernel[(len(output), output.shape[1])](
        partials.out,
        partials.lse,
        output,
        output.shape[1],
        output.stride(0),
        output.stride(1),
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
