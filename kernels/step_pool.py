"""Step embeddings: the mean of the hidden states over each step's tokens, scaled to unit norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from sglang_ets.kernels.dispatch import (
    Backend,
    LaunchConfig,
    check_indices,
    check_matrix,
    choose_backend,
    warps_for_row,
)

NORM_FLOOR = 1e-12  # a mean shorter than this keeps a norm below 1 instead of dividing by zero
ROWS_IN_FLIGHT = 4  # independent loads per loop turn, to cover memory latency


def step_pool_reference(
    hidden: torch.Tensor,  # float [T, H]
    offsets: torch.Tensor,  # int64 [S + 1], on hidden's device
) -> torch.Tensor:  # float32 [S, H]
    """The specification of `step_pool` in plain torch; the CPU path."""
    lengths = offsets.diff()
    segment_of_row = torch.repeat_interleave(lengths)
    rows = hidden[offsets[0] : offsets[-1]].float()
    mean = rows.new_zeros(len(lengths), hidden.shape[1]).index_add_(0, segment_of_row, rows)
    mean /= lengths.clamp(min=1).unsqueeze(1)
    unit = mean / mean.norm(dim=1, keepdim=True).clamp(min=NORM_FLOOR)
    return torch.where(lengths.unsqueeze(1) > 0, unit, 0.0)


@triton.jit(do_not_specialize=["num_rows"])  # it differs from batch to batch: compiled once for all
def step_pool_kernel(
    hidden_ptr: tl.tensor,  # float [num_rows, num_cols], any strides
    offsets_ptr: tl.tensor,  # int64 [programs + 1]
    out_ptr: tl.tensor,  # float32 [programs, num_cols]
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    stride_row: tl.tensor,
    stride_col: tl.tensor,
    NORM_FLOOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS_IN_FLIGHT: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    start = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    # Offsets on the device cannot be checked without a synchronisation: a bad pair reads nothing and yields NaN.
    in_range = (start >= 0) & (start <= end) & (end <= num_rows)
    count = tl.where(in_range, end - start, 0).to(tl.int32)
    cols = tl.arange(0, BLOCK_H)
    col_mask = cols < num_cols
    row_ptrs = hidden_ptr + start * stride_row + cols.to(tl.int64) * stride_col
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for first in range(0, count, ROWS_IN_FLIGHT):
        for k in tl.static_range(ROWS_IN_FLIGHT):
            mask = col_mask & (first + k < count)
            total += tl.load(row_ptrs + k * stride_row, mask=mask, other=0.0).to(tl.float32)
        row_ptrs += ROWS_IN_FLIGHT * stride_row
    mean = total / tl.maximum(count, 1).to(tl.float32)
    norm = tl.sqrt(tl.sum(mean * mean, axis=0))
    unit = tl.where(in_range, mean / tl.maximum(norm, NORM_FLOOR), float("nan"))
    tl.store(out_ptr + segment.to(tl.int64) * num_cols + cols, unit, mask=col_mask)


def launch_config(num_cols: int) -> LaunchConfig:
    """Compile-time settings for rows of `num_cols`: one program holds a whole row, so the input is read once."""
    block = triton.next_power_of_2(num_cols)
    constants = {"NORM_FLOOR": NORM_FLOOR, "BLOCK_H": block, "ROWS_IN_FLIGHT": ROWS_IN_FLIGHT}
    return LaunchConfig(constants=constants, num_warps=warps_for_row(block), num_stages=1)


def step_pool(
    hidden: torch.Tensor,  # float32 | float16 | bfloat16 [T, H], any strides
    offsets: torch.Tensor,  # int64 [S + 1], on the CPU or hidden's device
    *,
    backend: Backend | None = None,
) -> torch.Tensor:  # float32 [S, H], on hidden's device
    """Unit-norm mean of rows offsets[s] to offsets[s + 1] of `hidden` per segment s.

    Segments are adjacent and may be empty (a zero vector); rows before the first offset or from the last one on are
    not read. Sums run in float32. Mutates nothing and does not synchronise: offsets on the CPU are checked, offsets
    on a CUDA device are not, and there an invalid segment comes back as NaN.

    Raises: ValueError for wrong shapes, dtypes or devices, and for offsets that decrease or leave the input.
    """
    check_matrix("hidden", hidden)
    check_indices("offsets", offsets, hidden.device)
    if len(offsets) == 0:
        raise ValueError("offsets must hold one value more than there are segments, got none: pass [0] for no segments")
    if offsets.device.type == "cpu":
        _check_offsets(offsets, len(hidden))
    chosen = choose_backend(hidden.device, backend)
    offsets = offsets.to(hidden.device, non_blocking=True)
    if chosen == "reference":
        return step_pool_reference(hidden, offsets)
    return _launch(hidden, offsets.contiguous())


def _check_offsets(offsets: torch.Tensor, num_rows: int) -> None:
    first, last = int(offsets[0]), int(offsets[-1])
    if first < 0 or last > num_rows or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"offsets must not decrease and must lie in 0..{num_rows} (the rows of hidden), "
            f"got {offsets.tolist()}: build them as a cumulative sum of step lengths"
        )


def _launch(hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    num_segments, num_cols = len(offsets) - 1, hidden.shape[1]
    out = torch.empty(num_segments, num_cols, dtype=torch.float32, device=hidden.device)
    if num_segments == 0:
        return out
    config = launch_config(num_cols)
    step_pool_kernel[(num_segments,)](
        hidden,
        offsets,
        out,
        hidden.shape[0],
        num_cols,
        hidden.stride(0),
        hidden.stride(1),
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
