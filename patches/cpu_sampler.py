"""Draws of a search by its seed, on the CPU: the same seed grows the same tree, whatever else the server does.

sglang draws by seed only in its deterministic mode, which needs an accelerator. Here each row of a search has a seed of its own
(see `children.child_seed`), and a token is one uniform number, a hash of that seed and the position, put through the inverse of
the row's distribution. What other rows a batch holds does not matter. Rows of other requests have no seed: sglang draws them.

Where several nodes share a row, the row's seeds are a matrix, and each of them draws from the one distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang_ets.patches.record import Patch, Use

NO_SEED = -1  # of a row that belongs to no search; the seeds of a search's rows are not negative
NUM_HEAVY = 1024  # tokens of a row that are sorted for its top-p; few rows need more
BLOCK = 128  # columns that are added up before single ones are looked at
# Constants of the splitmix64 generator (Steele, Lea, Flood 2014).
_STEP, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MANTISSA_BITS = 53


def seed_rows(original: Callable[..., Any], cls: type, batch: Any, vocab_size: int) -> Any:
    """`SamplingBatchInfo` with a seed or `NO_SEED` for every row. sglang filters and merges them with the batch."""
    info = original(cls, batch, vocab_size)
    if info.sampling_seed is None:
        info.sampling_seed = torch.tensor(row_seeds(batch.reqs), dtype=torch.int64)
    return info


def row_seeds(reqs: Sequence[Any]) -> list[int]:
    """The seed of each request, `NO_SEED` for one that is no child of a search."""
    from sglang_ets.engine.children import ChildReq

    return [req.sampling_params.sampling_seed if isinstance(req, ChildReq) else NO_SEED for req in reqs]


def sample_rows(
    original: Callable[..., Any],
    sampler: Any,
    probs: torch.Tensor,  # float[N, V]
    info: Any,
    positions: torch.Tensor,  # int64[N]
    is_simple: bool,
) -> tuple[torch.Tensor, Any]:
    """A token for each row (int32[N]) and what sglang captured on the way: rows with a seed by it, the others as ever.

    If the seeds are int64[N, K], the first is the row's, and the tokens of the others are left in `FURTHER_KEY` of `info`.
    """
    from sglang_ets.engine.strands import FURTHER_KEY

    seeds = info.sampling_seed.view(len(probs), -1)
    is_seeded = seeds[:, 0] != NO_SEED
    token_ids, capture = torch.empty(seeds.shape, dtype=torch.int32), None
    if not is_seeded.all():
        # Rows of searches are drawn here too, and drawn again below.
        drawn, capture = original(sampler, drawable(probs), replace(info, sampling_seed=None), positions, is_simple)
        token_ids[:, 0] = drawn
    if is_seeded.any():
        _draw_seeded(token_ids, probs, info, seeds, positions, is_seeded)
    if seeds.shape[1] > 1:
        setattr(info, FURTHER_KEY, token_ids[:, 1:])
    return token_ids[:, 0].contiguous(), capture


def draws_further(logits: torch.Tensor, info: Any) -> bool:
    """Whether the sampler, called with these, comes to `sample_rows`. Tokens by seed need no agreement between ranks."""
    return logits.device.type == "cpu" and info.sampling_seed is not None and not info.is_all_greedy


def drawable(probs: torch.Tensor) -> torch.Tensor:
    """float[N, V], the same unless a row is no distribution: that one has its first token alone.

    A grammar that allows no token leaves such a row, and so do penalties beyond all measure. Where a row of the batch has
    top-p, top-k or min-p, sglang raises on it, which ends the scheduler; elsewhere it takes the first token too. The grammar
    then refuses that token, and the request ends with an error.
    """
    totals = probs.sum(dim=1)
    is_broken = ~(totals.isfinite() & (totals > 0))
    if not is_broken.any():
        return probs
    probs = probs.clone()
    probs[is_broken] = 0.0
    probs[is_broken, 0] = 1.0
    return probs


def _draw_seeded(
    token_ids: torch.Tensor,  # int32[N, K]
    probs: torch.Tensor,  # float[N, V]
    info: Any,
    seeds: torch.Tensor,  # int64[N, K]
    positions: torch.Tensor,  # int64[N]
    is_seeded: torch.Tensor,  # bool[N]
) -> None:
    """Write the tokens of the rows with a seed. Each goes the way that its own parameters ask for, not those of the batch."""
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    is_cut = (info.top_ks != TOP_K_ALL) | (info.top_ps != 1)
    for rows, is_way_cut in ((is_seeded & ~is_cut, False), (is_seeded & is_cut, True)):
        if not rows.any():
            continue
        weights, of_rows = probs if rows.all() else probs[rows], (seeds[rows], positions[rows])
        if info.need_min_p_sampling:
            # sglang refuses min_p and seeds together. It drops the lightest tokens, on which neither top-k nor top-p
            # of the heavier ones depends, so it may come before them.
            weights = weights.masked_fill(weights < weights.amax(1, keepdim=True) * info.min_ps[rows, None], 0.0)
        if is_way_cut:
            token_ids[rows] = _draw_cut(weights, info.top_ks[rows], info.top_ps[rows], *of_rows)
        else:
            token_ids[rows] = _columns(weights, *of_rows).to(torch.int32)


def _draw_cut(
    weights: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """int32[N, K]: a token for each seed, of weights (float[N, V]) that are cut by top-k and top-p.

    Only as many of the heaviest tokens are sorted as the cut can leave, which depends on nothing but the row: its top-k, or
    `NUM_HEAVY` if these are more than its top-p. The other rows are sorted whole, by sglang.
    """
    from sglang.srt.layers import sampler

    sizes = top_ks.clamp(max=min(NUM_HEAVY, weights.shape[1]))
    token_ids, is_whole = torch.empty(seeds.shape, dtype=torch.int32), torch.zeros(len(weights), dtype=torch.bool)
    for size in sizes.unique().tolist():
        rows = (sizes == size).nonzero()[:, 0]
        heavy, columns = weights[rows].topk(size)
        sums = heavy.cumsum(1)
        is_left_over = (size < top_ks[rows]) & (size < weights.shape[1]) & (sums[:, -1] <= top_ps[rows])
        is_whole[rows] = is_left_over
        rows, heavy, columns, sums = (one[~is_left_over] for one in (rows, heavy, columns, sums))
        heavy[sums - heavy > top_ps[rows, None]] = 0.0
        token_ids[rows] = columns.gather(1, _columns(heavy.double(), seeds[rows], positions[rows])).to(torch.int32)
    if is_whole.any():
        whole = [one[is_whole] for one in (weights, top_ks, top_ps)]
        none, of_rows = torch.zeros(len(whole[0])), (seeds[is_whole], positions[is_whole])
        drawn = sampler.top_k_top_p_min_p_sampling_from_probs_torch(*whole, none, False, *of_rows)
        token_ids[is_whole] = drawn.view(-1, seeds.shape[1])
    return token_ids


def draw_by_seed(
    _original: Callable[..., Any], logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """int64[N, K], for each seed (int64[N, K], or [N]) a column of its row of `logprobs` (float[N, V]; any sum)."""
    return _columns(logprobs.to(torch.float64).exp_(), seed.view(len(logprobs), -1), positions)


def _columns(weights: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64[N, K], as `draw_by_seed`, of weights (float[N, V]). A column of weight 0 is never drawn, unless all are.

    Where the blocks that K draws fall into are less than the row, it is read once, to add up all of its blocks, and columns are
    added one by one only in those.
    """
    num_columns = weights.shape[1]
    if seeds.shape[1] * BLOCK >= num_columns:
        sums = weights.to(torch.float64).cumsum(dim=1)
        drawn = torch.from_numpy(uniform(seeds.numpy(), positions.numpy()[:, None])) * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True).clamp_(max=num_columns - 1)
    if num_columns % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -num_columns % BLOCK))
    blocks = weights.unflatten(1, (-1, BLOCK))  # float[N, B, BLOCK]
    sums = blocks.sum(2).to(torch.float64).cumsum_(1)
    drawn = torch.from_numpy(uniform(seeds.numpy(), positions.numpy()[:, None])) * sums[:, -1:]  # float64[N, K]
    # The first block whose sum exceeds the draw, then in it the first column; rounding must not lead past its last weight.
    block = torch.searchsorted(sums, drawn, right=True).clamp_(max=sums.shape[1] - 1)
    rest = drawn - torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    own = blocks[torch.arange(len(blocks))[:, None], block].to(torch.float64)  # float64[N, K, BLOCK]
    column = torch.searchsorted(own.cumsum(2), rest[..., None], right=True)[..., 0]
    last = BLOCK - 1 - (own > 0).flip(2).to(torch.uint8).argmax(2)
    return (block * BLOCK + torch.minimum(column, last)).clamp_(max=num_columns - 1)


def uniform(seed: NDArray[np.int64], position: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Numbers in [0, 1) in the common shape of both (int64), each a hash of seed and position."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seed.astype(np.uint64) + _STEP) + position.astype(np.uint64) * _STEP)
    return np.asarray((mixed >> np.uint64(64 - _MANTISSA_BITS)) / float(1 << _MANTISSA_BITS), dtype=np.float64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


WHY = "the same seed grows the same tree on the CPU too, where sglang's deterministic mode does not exist"
UPSTREAM = "none: not asked for yet"
SAMPLING_FIELDS = ("sampling_seed", "top_ks", "top_ps", "min_ps", "need_min_p_sampling", "is_all_greedy")
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
        target="sglang.srt.layers.sampler.Sampler._sample_from_probs",
        kind="around",
        hook="sglang_ets.patches.cpu_sampler:sample_rows",
        parameters=("self", "probs", "sampling_info", "positions", "simple_sampling_case"),
        tested=("3b076117aa3f730a",),
        why="only rows of searches are drawn by seed, with min_p too; all others by sglang as if there were no seeds",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        condition="cpu",
        uses=(Use("sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo", SAMPLING_FIELDS),),
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
