"""Cosine distances between all pairs of step embeddings: one triangle of tiles on the tensor cores, then mirrored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from sglang_ets.kernels.dispatch import INTERPRETED, Backend, LaunchConfig, check_matrix, choose_backend

MAX_EMBEDDINGS = 1024  # the largest search width; the output is dense, 4 MiB there
NORM_FLOOR = 1e-12  # an embedding shorter than this counts as zero: distance 1 to every other
BLOCK_N = 64  # 64 rows fill one tensor-core instruction on sm_90 and sm_100
BLOCK_H = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}  # float32 is split in three: more would spill
NUM_WARPS = 8  # with 4, the tile, its products and the norms spill on sm_100
NUM_STAGES = 4  # tiles in flight; the reads of one program are too few to hide memory latency otherwise


def pairwise_cosine_reference(embeddings: torch.Tensor) -> torch.Tensor:  # float [N, H] -> float32 [N, N]
    """The specification of `pairwise_cosine` in plain torch; the CPU path."""
    rows = embeddings.float()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=NORM_FLOOR)
    upper: torch.Tensor = (1.0 - unit @ unit.T).clamp(0.0, 2.0).triu(diagonal=1)
    return upper + upper.T


@triton.jit(do_not_specialize=["num_rows"])  # it differs from batch to batch: compiled once for all
def pairwise_cosine_kernel(
    embeddings_ptr: tl.tensor,  # float [num_rows, num_cols], any strides
    out_ptr: tl.tensor,  # float32 [num_rows, num_rows]
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    stride_row: tl.tensor,
    stride_col: tl.tensor,
    NORM_FLOOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
) -> None:
    tile_row = tl.program_id(0)
    tile_col = tl.program_id(1)
    if tile_col < tile_row:  # below the diagonal: its mirror image writes this tile
        return
    rows = tile_row * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_col * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < num_rows
    col_mask = cols < num_rows
    dims = tl.arange(0, BLOCK_H)
    left_ptrs = embeddings_ptr + rows.to(tl.int64)[:, None] * stride_row + dims[None, :] * stride_col
    right_ptrs = embeddings_ptr + cols.to(tl.int64)[:, None] * stride_row + dims[None, :] * stride_col
    dots = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    left_squares = tl.zeros([BLOCK_N], dtype=tl.float32)
    right_squares = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, num_cols, BLOCK_H):
        dim_mask = (first + dims < num_cols)[None, :]
        left = tl.load(left_ptrs, mask=row_mask[:, None] & dim_mask, other=0.0)
        right = tl.load(right_ptrs, mask=col_mask[:, None] & dim_mask, other=0.0)
        if DOT_IN_FLOAT32:
            left, right = left.to(tl.float32), right.to(tl.float32)
        # Three TF32 products keep float32 accuracy; one would leave 1e-3, close to the distances that clusters cut at.
        dots = tl.dot(left, tl.trans(right), dots, input_precision="tf32x3")
        left_squares += tl.sum(left.to(tl.float32) * left.to(tl.float32), axis=1)
        right_squares += tl.sum(right.to(tl.float32) * right.to(tl.float32), axis=1)
        left_ptrs += BLOCK_H * stride_col
        right_ptrs += BLOCK_H * stride_col
    left_norms = tl.maximum(tl.sqrt(left_squares), NORM_FLOOR)
    right_norms = tl.maximum(tl.sqrt(right_squares), NORM_FLOOR)
    distances = 1.0 - dots / (left_norms[:, None] * right_norms[None, :])
    distances = tl.minimum(tl.maximum(distances, 0.0), 2.0)
    on_diagonal = rows[:, None] == cols[None, :]
    distances = tl.where(on_diagonal, 0.0, distances)
    # Each pair is written by exactly one element and its transpose, so the matrix is symmetric to the last bit.
    mask = (rows[:, None] <= cols[None, :]) & col_mask[None, :]
    tl.store(out_ptr + rows[:, None] * num_rows + cols[None, :], distances, mask=mask)
    mirrored_mask = (rows[None, :] < cols[:, None]) & col_mask[:, None]
    tl.store(out_ptr + cols[:, None] * num_rows + rows[None, :], tl.trans(distances), mask=mirrored_mask)


def launch_config(dtype: torch.dtype) -> LaunchConfig:
    """Compile-time settings: square tiles of embeddings, some columns per loop turn."""
    constants = {
        "NORM_FLOOR": NORM_FLOOR,
        "BLOCK_N": BLOCK_N,
        "BLOCK_H": BLOCK_H[dtype],
        # The interpreter's tl.dot multiplies the bit patterns of bfloat16 (triton issue 11584); a real GPU never casts.
        "DOT_IN_FLOAT32": INTERPRETED and dtype == torch.bfloat16,
    }
    return LaunchConfig(constants=constants, num_warps=NUM_WARPS, num_stages=NUM_STAGES)


def pairwise_cosine(
    embeddings: torch.Tensor,  # float32 | float16 | bfloat16 [N, H], any strides, N <= 1024
    *,
    backend: Backend | None = None,
) -> torch.Tensor:  # float32 [N, N], on embeddings' device
    """Distances 1 - cosine in 0..2 between all pairs of rows: symmetric, zero diagonal, 1 from a zero row to any other.

    Rows need not have unit norm. Only pairs above the diagonal are computed. Mutates nothing, does not synchronise.

    Raises: ValueError for a wrong shape or dtype, and for more than 1024 rows.
    """
    check_matrix("embeddings", embeddings)
    if len(embeddings) > MAX_EMBEDDINGS:
        raise ValueError(
            f"embeddings must hold at most {MAX_EMBEDDINGS} rows (the largest search width), "
            f"got {len(embeddings)}: lower the width or cluster in parts"
        )
    if choose_backend(embeddings.device, backend) == "reference":
        return pairwise_cosine_reference(embeddings)
    return _launch(embeddings)


def _launch(embeddings: torch.Tensor) -> torch.Tensor:
    num_rows, num_cols = embeddings.shape
    out = torch.empty(num_rows, num_rows, dtype=torch.float32, device=embeddings.device)
    if num_rows == 0:
        return out
    config = launch_config(embeddings.dtype)
    num_tiles = triton.cdiv(num_rows, config.constants["BLOCK_N"])
    pairwise_cosine_kernel[(num_tiles, num_tiles)](
        embeddings,
        out,
        num_rows,
        num_cols,
        embeddings.stride(0),
        embeddings.stride(1),
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
