"""Extension of a cached prefix on the CPU in time linear in the prefix.

The stock backend pads the queries of an extend to the whole sequence and throws the padding's output away. A search
extends long prefixes by short steps, in the policy model and in the PRM, so nearly all of that work is waste.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang_ets.patches.record import Patch
from torch.nn.functional import scaled_dot_product_attention

BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


def extend_real_rows(original: Callable[..., Any], backend: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stock code for cross attention, sliding windows and full attention; ours for plain causal decoders."""
    is_plain = kwargs.get("causal") and not kwargs.get("is_cross_attn") and kwargs.get("sliding_window_size") is None
    if not is_plain or len(args) != NUM_POSITIONAL or args[-1] is not None:
        return original(backend, *args, **kwargs)
    return causal_extend(*args[:-1], scaling=kwargs.get("scaling"), enable_gqa=kwargs.get("enable_gqa", False))


NUM_POSITIONAL = 10  # tensors that the backend passes by position; the last is encoder_lens


def causal_extend(
    query: torch.Tensor,  # [tokens, heads, head_size], the new tokens of all sequences
    output: torch.Tensor,  # [tokens, heads, value_size], written
    k_cache: torch.Tensor,  # [pool, kv_heads, head_size]
    v_cache: torch.Tensor,  # [pool, kv_heads, value_size]
    req_to_token: torch.Tensor,  # int[requests, context]: pool slot of each position
    req_pool_indices: torch.Tensor,  # int[sequences]
    seq_lens: torch.Tensor,  # int[sequences], prefix and new tokens
    extend_prefix_lens: torch.Tensor,  # int[sequences]
    extend_seq_lens: torch.Tensor,  # int[sequences]
    *,
    scaling: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its prefix and themselves. Returns `output`."""
    lengths = zip(
        req_pool_indices.tolist(), seq_lens.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True
    )
    start = 0
    for row, num_kv, num_prefix, num_new in lengths:
        slots = req_to_token[row, :num_kv]
        new = slice(start, start + num_new)
        out = scaled_dot_product_attention(
            query[new].transpose(0, 1).unsqueeze(0),
            k_cache[slots].transpose(0, 1).unsqueeze(0).to(query.dtype),
            v_cache[slots].transpose(0, 1).unsqueeze(0).to(query.dtype),
            attn_mask=_bottom_right(num_new, num_kv, query.device) if num_prefix and num_new > 1 else None,
            is_causal=num_prefix == 0 and num_new > 1,  # a single new token sees everything before it
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output[new] = out.squeeze(0).transpose(0, 1)
        start += num_new
    return output


def _bottom_right(num_new: int, num_kv: int, device: torch.device) -> torch.Tensor:
    """bool[new, kv]: new token i sees the prefix and the new tokens up to itself."""
    return torch.ones(num_new, num_kv, dtype=torch.bool, device=device).tril(num_kv - num_new)


PATCHES: tuple[Patch, ...] = (
    Patch(
        f"{BACKEND}._run_sdpa_forward_extend",
        "around",
        "sglang_ets.patches.torch_native:extend_real_rows",
        "cd0f84f549310107925def9608c902872bac6fb777230cea44e22d79bf5a4d43",
        "computes attention for the new tokens only; the stock code computes it for the whole sequence",
        "none: not reported yet",
        "the stock backend stops padding the queries of an extend",
        "cpu",
    ),
)
