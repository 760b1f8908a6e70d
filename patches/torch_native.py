"""Attention on the CPU that reads the pages of all sequences in place, in time linear in the new tokens.

The stock backend calls torch once for each sequence, after copying its keys and values; for an extend it also pads the
queries to the whole sequence and throws the padding's output away. A search decodes hundreds of short rows at once and extends
long prefixes by short steps, in the policy model and in the PRM: on the CPU most of its time went there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang_ets.kernels import PagedBatch, paged_attention
from sglang_ets.patches.record import Patch

BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
NUM_EXTEND, NUM_DECODE = 10, 8  # tensors that the backend passes by position; the last is encoder_lens


def extend(original: Callable[..., Any], backend: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`_run_sdpa_forward_extend`: ours for plain causal decoders, else the stock code."""
    if not (kwargs.get("causal") and is_plain(args, kwargs, NUM_EXTEND)):
        return original(backend, *args, **kwargs)
    *tensors, rows, kv_lengths, _, new_lengths, _ = args
    return attend(tensors, rows, kv_lengths, new_lengths.tolist(), kwargs)


def decode(original: Callable[..., Any], backend: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`_run_sdpa_forward_decode`: ours for plain decoders, else the stock code."""
    if not is_plain(args, kwargs, NUM_DECODE):
        return original(backend, *args, **kwargs)
    *tensors, rows, kv_lengths, _ = args
    return attend(tensors, rows, kv_lengths, [1] * len(rows), kwargs)


def is_plain(args: tuple[Any, ...], kwargs: dict[str, Any], num_tensors: int) -> bool:
    """No cross attention, no sliding window, and the arguments that this pin of sglang passes."""
    is_other = kwargs.get("is_cross_attn") or kwargs.get("sliding_window_size") is not None
    return not is_other and len(args) == num_tensors and args[-1] is None


def attend(
    tensors: list[torch.Tensor],  # query, output, key pool, value pool, req_to_token
    rows: torch.Tensor,  # int[sequences]
    kv_lengths: torch.Tensor,  # int[sequences]
    new_lengths: list[int],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Writes and returns the output."""
    paged_attention(PagedBatch(*tensors, rows.tolist(), kv_lengths.tolist(), new_lengths, kwargs.get("scaling")))
    return tensors[1]


UPSTREAM = "none: not reported yet"
TENSORS = ("self", "query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens")
SETTINGS = ("encoder_lens", "scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size")

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{BACKEND}._run_sdpa_forward_extend",
        kind="around",
        hook="sglang_ets.patches.torch_native:extend",
        parameters=(*TENSORS, "extend_prefix_lens", "extend_seq_lens", *SETTINGS),
        tested=("9169a16e2efa91f4",),
        why="computes attention for the new tokens only; the stock code computes it for the whole sequence",
        upstream=UPSTREAM,
        remove_when="the stock backend stops padding the queries of an extend",
        condition="cpu",
    ),
    Patch(
        target=f"{BACKEND}._run_sdpa_forward_decode",
        kind="around",
        hook="sglang_ets.patches.torch_native:decode",
        parameters=(*TENSORS, *SETTINGS),
        tested=("fa68ed28409a5e2d",),
        why="one kernel for all rows of a decode; the stock code copies the keys and values of one row after another",
        upstream=UPSTREAM,
        remove_when="the stock backend decodes all rows at once",
        condition="cpu",
    ),
)
