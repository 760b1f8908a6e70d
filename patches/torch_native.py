"""Attention on the CPU that reads the pages of all sequences in place, in time linear in the new tokens.

The stock backend calls torch once for each sequence, after copying its keys and values; for an extend it also pads the
queries to the whole sequence and throws the padding's output away. A search decodes hundreds of short rows at once and extends
long prefixes by short steps, in the policy model and in the PRM: on the CPU most of its time went there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from sglang_ets.kernels import Layout, PagedBatch, layout_of, paged_attention, slow_path_reason
from sglang_ets.patches.record import Patch

from sglang_ets.core.attention_plan import MAX_SEGMENTS_CPU, MIN_SAVED_TOKENS_CPU, AttentionPlan, SlotPlanner

logger = logging.getLogger(__name__)

BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
PASS = "_ets_forward_pass"  # of a backend, of which each model has its own
NUM_EXTEND, NUM_DECODE = 10, 8  # tensors that the backend passes by position; the last is encoder_lens


def extend(original: Callable[..., torch.Tensor], backend: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`_run_sdpa_forward_extend`: ours for plain causal decoders, else the stock code."""
    if not (kwargs.get("causal") and is_plain(args, kwargs, NUM_EXTEND)):
        return original(backend, *args, **kwargs)
    *tensors, rows, kv_lengths, _, new_lengths, _ = args
    return attend(backend, tensors, rows, kv_lengths, new_lengths.tolist(), kwargs)


def decode(original: Callable[..., torch.Tensor], backend: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`_run_sdpa_forward_decode`: ours for plain decoders, else the stock code."""
    if not is_plain(args, kwargs, NUM_DECODE):
        return original(backend, *args, **kwargs)
    *tensors, rows, kv_lengths, _ = args
    return attend(backend, tensors, rows, kv_lengths, [1] * len(rows), kwargs)


def is_plain(args: tuple[Any, ...], kwargs: dict[str, Any], num_tensors: int) -> bool:
    """No cross attention, no sliding window, and the arguments that this pin of sglang passes."""
    is_other = kwargs.get("is_cross_attn") or kwargs.get("sliding_window_size") is not None
    return not is_other and len(args) == num_tensors and args[-1] is None


def attend(
    backend: Any,
    tensors: list[torch.Tensor],  # query, output, key pool, value pool, req_to_token
    rows: torch.Tensor,  # int[sequences]
    kv_lengths: torch.Tensor,  # int[sequences]
    new_lengths: list[int],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Writes and returns the output."""
    query, output, k_cache, v_cache, slots = tensors
    batch = PagedBatch(
        query, output, k_cache, v_cache, slots, rows.tolist(), kv_lengths.tolist(), new_lengths, kwargs.get("scaling")
    )
    current = getattr(backend, PASS, None) or ForwardPass()
    setattr(backend, PASS, current)
    paged_attention(replace(batch, layout=current.layout(batch)))
    return output


@dataclass
class ForwardPass:
    """What the layers of one forward pass have in common: where each row's keys lie, and which of them rows share."""

    _key: tuple[list[int], list[int], list[int]] | None = None
    _layers: set[int] = field(default_factory=set)  # addresses of the key pools that this pass has read
    _layout: Layout | None = None
    _planner: SlotPlanner = field(default_factory=lambda: SlotPlanner(MIN_SAVED_TOKENS_CPU, MAX_SEGMENTS_CPU))

    def layout(self, batch: PagedBatch) -> Layout:
        """The layout of the pass that this batch belongs to: a new one when its rows change or a layer comes again."""
        key = (batch.rows, batch.kv_lengths, batch.new_lengths)
        layer = batch.k_cache.data_ptr()
        if self._layout is None or key != self._key or layer in self._layers:
            reason = slow_path_reason(batch)
            if self._layout is None and reason is not None:
                logger.warning("attention on this CPU is left to torch, sequence by sequence: %s", reason)
            self._key, self._layers = key, set()
            self._layout = layout_of(*key, self._plan(batch) if reason is None else None)
        self._layers.add(layer)
        return self._layout

    def _plan(self, batch: PagedBatch) -> AttentionPlan | None:
        """Rows that begin with the same pages read these together. Results are the same bits."""
        if len(batch.rows) < 2:
            return None
        num_cached = np.array(batch.kv_lengths, dtype=np.int64) - np.array(batch.new_lengths, dtype=np.int64)
        return self._planner.plan(batch.req_to_token[batch.rows, : num_cached.max()].numpy(), num_cached)


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
