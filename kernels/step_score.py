"""Step scores: the head's few rows that matter, read at given positions; full-vocabulary logits never exist."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from sglang_ets.kernels.dispatch import (
    Backend,
    LaunchConfig,
    check_indices,
    check_matrix,
    check_vector,
    choose_backend,
    warps_for_row,
)

Activation = Literal["softmax", "sigmoid", "none"]

MAX_HEAD_ROWS = 3  # a label and its rivals: +/- tokens, two or three labels
BLOCK_H_LIMIT = 2048  # columns per loop turn; wider tiles times four padded head rows would spill


def step_score_reference(
    hidden: torch.Tensor,  # float [T, H]
    positions: torch.Tensor,  # int64 [P], on hidden's device
    head_rows: torch.Tensor,  # float [R, H]
    bias: torch.Tensor | None,  # float [R]
    activation: Activation,
    index: int,
) -> torch.Tensor:  # float32 [P]
    """The specification of `step_score` in plain torch; the CPU path."""
    logits = hidden[positions].float() @ head_rows.float().T
    if bias is not None:
        logits += bias.float()
    if activation == "softmax":
        return logits.softmax(dim=1)[:, index]
    return logits[:, index].sigmoid() if activation == "sigmoid" else logits[:, index]


@triton.jit(do_not_specialize=["num_rows"])  # it differs from batch to batch: compiled once for all
def step_score_kernel(
    hidden_ptr: tl.tensor,  # float [num_rows, num_cols], any strides
    positions_ptr: tl.tensor,  # int64 [programs]
    head_ptr: tl.tensor,  # float [NUM_HEAD_ROWS, num_cols], any strides
    bias_ptr: tl.tensor,  # float [NUM_HEAD_ROWS]
    out_ptr: tl.tensor,  # float32 [programs]
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    stride_row: tl.tensor,
    stride_col: tl.tensor,
    stride_head_row: tl.tensor,
    stride_head_col: tl.tensor,
    index: tl.tensor,
    NUM_HEAD_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SIGMOID: tl.constexpr,
) -> None:
    which = tl.program_id(0)
    position = tl.load(positions_ptr + which)
    # Positions on the device cannot be checked without a synchronisation: a bad one reads nothing and yields NaN.
    in_range = (position >= 0) & (position < num_rows)
    rows = tl.arange(0, BLOCK_R)
    row_mask = rows < NUM_HEAD_ROWS
    products = tl.zeros([BLOCK_R, BLOCK_H], dtype=tl.float32)
    for first in range(0, num_cols, BLOCK_H):
        cols = first + tl.arange(0, BLOCK_H).to(tl.int64)
        col_mask = cols < num_cols
        state = tl.load(hidden_ptr + position * stride_row + cols * stride_col, mask=col_mask & in_range, other=0.0)
        head_ptrs = head_ptr + rows[:, None] * stride_head_row + cols[None, :] * stride_head_col
        head = tl.load(head_ptrs, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
        products += head.to(tl.float32) * state.to(tl.float32)[None, :]
    logits = tl.sum(products, axis=1)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    if SOFTMAX:
        logits = tl.where(row_mask, logits, -float("inf"))
        powers = tl.exp(logits - tl.max(logits, axis=0))
        values = powers / tl.sum(powers, axis=0)
    elif SIGMOID:
        values = 1.0 / (1.0 + tl.exp(-logits))
    else:
        values = logits
    score = tl.sum(tl.where(rows == index, values, 0.0), axis=0)
    tl.store(out_ptr + which, tl.where(in_range, score, float("nan")))


def launch_config(num_cols: int, num_head_rows: int, has_bias: bool, activation: Activation) -> LaunchConfig:
    """Compile-time settings: one program per position, looping over the columns in blocks."""
    block = min(BLOCK_H_LIMIT, triton.next_power_of_2(num_cols))
    constants = {
        "NUM_HEAD_ROWS": num_head_rows,
        "BLOCK_R": triton.next_power_of_2(num_head_rows),
        "BLOCK_H": block,
        "HAS_BIAS": has_bias,
        "SOFTMAX": activation == "softmax",
        "SIGMOID": activation == "sigmoid",
    }
    return LaunchConfig(constants=constants, num_warps=warps_for_row(block), num_stages=1)


def step_score(
    hidden: torch.Tensor,  # float32 | float16 | bfloat16 [T, H], any strides
    positions: torch.Tensor,  # int64 [P], on the CPU or hidden's device
    head_rows: torch.Tensor,  # float [R, H], R in 1..3, on hidden's device
    bias: torch.Tensor | None = None,  # float [R]
    *,
    activation: Activation = "softmax",
    index: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:  # float32 [P], on hidden's device
    """Score of row `index` of the head at each position: its softmax share of the R rows, its sigmoid, or its logit.

    `activation="none"` returns the logit. Products are summed in float32. Mutates nothing and does not synchronise:
    positions on the CPU are checked, positions on a CUDA device are not, and there a bad one comes back as NaN.

    Raises: ValueError for wrong shapes, dtypes or devices, an unknown activation, an index without a row, a softmax
    over one row (always 1), and positions outside the input.
    """
    check_matrix("hidden", hidden)
    check_indices("positions", positions, hidden.device)
    _check_head(hidden, head_rows, bias, activation, index)
    if positions.device.type == "cpu":
        _check_positions(positions, len(hidden))
    chosen = choose_backend(hidden.device, backend)
    positions = positions.to(hidden.device, non_blocking=True)
    if activation != "softmax":  # the other rows cannot change the result: do not read them
        head_rows, bias = head_rows[index : index + 1], None if bias is None else bias[index : index + 1]
        index = 0
    if chosen == "reference":
        return step_score_reference(hidden, positions, head_rows, bias, activation, index)
    return _launch(hidden, positions.contiguous(), head_rows, bias, activation, index)


def _check_head(
    hidden: torch.Tensor, head_rows: torch.Tensor, bias: torch.Tensor | None, activation: str, index: int
) -> None:
    check_matrix("head_rows", head_rows)
    num_rows, num_cols = head_rows.shape
    if num_cols != hidden.shape[1] or head_rows.device != hidden.device:
        raise ValueError(
            f"head_rows must have hidden's {hidden.shape[1]} columns and device {hidden.device}, "
            f"got {num_cols} on {head_rows.device}: take the rows from the head of the same model"
        )
    if not 1 <= num_rows <= MAX_HEAD_ROWS:
        raise ValueError(f"head_rows must hold 1 to {MAX_HEAD_ROWS} rows, got {num_rows}: pass only rows that matter")
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if activation == "softmax" and num_rows == 1:
        raise ValueError("softmax over 1 head row is always 1: pass its rivals too, or use activation='sigmoid'")
    if not 0 <= index < num_rows:
        raise ValueError(f"index must name one of the {num_rows} head rows (0..{num_rows - 1}), got {index}")
    if bias is not None:
        check_vector("bias", bias, num_rows, hidden.device)


def _check_positions(positions: torch.Tensor, num_rows: int) -> None:
    outside = positions[(positions < 0) | (positions >= num_rows)]
    if len(outside) > 0:
        raise ValueError(
            f"positions must be rows of hidden (0..{num_rows - 1}), got {outside.tolist()}: "
            "give them in coordinates of this batch, not of the whole sequence"
        )


def _launch(
    hidden: torch.Tensor,
    positions: torch.Tensor,
    head_rows: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    index: int,
) -> torch.Tensor:
    out = torch.empty(len(positions), dtype=torch.float32, device=hidden.device)
    if len(positions) == 0:
        return out
    config = launch_config(hidden.shape[1], len(head_rows), bias is not None, activation)
    step_score_kernel[(len(positions),)](
        hidden,
        positions,
        head_rows,
        head_rows if bias is None else bias.contiguous(),  # never read when HAS_BIAS is false
        out,
        hidden.shape[0],
        hidden.shape[1],
        hidden.stride(0),
        hidden.stride(1),
        head_rows.stride(0),
        head_rows.stride(1),
        index,
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
