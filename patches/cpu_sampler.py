"""Draws of a search by its seed, on the CPU: the same seed grows the same tree, whatever else the server does.

sglang draws by seed only in its deterministic mode, which needs an accelerator. Here each row of a batch has a seed of its own
(a search's child: see `children.child_seed`; any other request: a fresh random one, so that ordinary sampling stays as it is),
and a token is one uniform number, a hash of that seed and the position, put through the inverse of the row's distribution. What
other rows a batch holds does not matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang_ets.patches.record import Patch, Use

SEED_BITS = 62
# Constants of the splitmix64 generator (Steele, Lea, Flood 2014).
_STEP, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MANTISSA_BITS = 53


def seed_rows(original: Callable[..., Any], cls: type, batch: Any, vocab_size: int) -> Any:
    """`SamplingBatchInfo` with a seed for every row. sglang filters and merges them with the batch."""
    info = original(cls, batch, vocab_size)
    if info.sampling_seed is None:
        info.sampling_seed = torch.tensor(row_seeds(batch.reqs), dtype=torch.int64)
    return info


def row_seeds(reqs: Sequence[Any]) -> list[int]:
    """A seed a request, below 2**SEED_BITS."""
    from sglang_ets.engine.children import ChildReq

    return [
        req.sampling_params.sampling_seed if isinstance(req, ChildReq) else random.getrandbits(SEED_BITS)
        for req in reqs
    ]


def draw_by_seed(
    _original: Callable[..., Any], logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """int64[N, 1], a column of each row of `logprobs` (float[N, V]; weights need not sum to 1)."""
    cumulative = logprobs.to(torch.float64).exp_().cumsum_(dim=1)
    total = cumulative[:, -1:]
    drawn = torch.from_numpy(uniform(seed.numpy(), positions.numpy()))[:, None] * total
    # The first column whose sum exceeds the draw: never one of weight 0.
    return torch.searchsorted(cumulative, drawn, right=True).clamp_(max=logprobs.shape[1] - 1)


def uniform(seed: NDArray[np.int64], position: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """float64[N] in [0, 1), a hash of seed and position (int64[N] each)."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seed.astype(np.uint64) + _STEP) + position.astype(np.uint64) * _STEP)
    return np.asarray((mixed >> np.uint64(64 - _MANTISSA_BITS)) / float(1 << _MANTISSA_BITS), dtype=np.float64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


WHY = "the same seed grows the same tree on the CPU too, where sglang's deterministic mode does not exist"
UPSTREAM = "none: not asked for yet"
GOES_WHEN = "sglang's deterministic mode works on the CPU"

PATCHES: tuple[Patch, ...] = (
    Patch(
        target="sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
        kind="around",
        hook="sglang_ets.patches.cpu_sampler:seed_rows",
        parameters=("cls", "batch", "vocab_size"),
        tested=("88cf145931ab0669",),
        why=WHY,
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        condition="cpu",
        uses=(
            Use("sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo", ("sampling_seed",)),
            Use("sglang.srt.managers.schedule_batch.ScheduleBatch", ("reqs",)),
        ),
    ),
    Patch(
        target="sglang.srt.layers.sampler.multinomial_with_seed",
        kind="around",
        hook="sglang_ets.patches.cpu_sampler:draw_by_seed",
        parameters=("logprobs", "seed", "positions"),
        tested=("e279f47ffd3c3085",),
        why=WHY,
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        condition="cpu",
    ),
)
