"""Extending a prefix gives the stock backend's results, at the cost of the new tokens only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang_ets.patches import torch_native
from sglang_ets.patches.torch_native import extend_real_rows

HEADS, HEAD_SIZE, POOL = 4, 16, 600
STOCK = TorchNativeAttnBackend._run_sdpa_forward_extend


def inputs(prefix: list[int], new: list[int], kv_heads: int) -> list[Any]:
    """Arguments that the backend passes by position, for sequences scattered over the pool."""
    generator = torch.Generator().manual_seed(0)
    total = [p + n for p, n in zip(prefix, new, strict=True)]
    slots = torch.randperm(POOL, generator=generator)
    rows = torch.zeros(len(new) + 2, max(total), dtype=torch.int32)
    for row, length in enumerate(total):
        rows[row + 1, :length] = slots[sum(total[:row]) : sum(total[:row]) + length]
    query = torch.randn(sum(new), HEADS, HEAD_SIZE, generator=generator)
    caches = [torch.randn(POOL, kv_heads, HEAD_SIZE, generator=generator) for _ in range(2)]
    lengths = [torch.tensor(values) for values in (total, prefix, new)]
    return [query, torch.zeros_like(query), *caches, rows, torch.arange(1, len(new) + 1), *lengths, None]


def both(prefix: list[int], new: list[int], kv_heads: int = HEADS, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"scaling": 0.3, "enable_gqa": kv_heads != HEADS, "causal": True, **kwargs}
    backend = SimpleNamespace(_make_sliding_window_mask=TorchNativeAttnBackend._make_sliding_window_mask)
    stock = STOCK(backend, *inputs(prefix, new, kv_heads), **settings)
    return stock, extend_real_rows(STOCK, backend, *inputs(prefix, new, kv_heads), **settings)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(
    ("prefix", "new"),
    [([0], [1]), ([0], [7]), ([9], [1]), ([33], [5]), ([0, 40, 12, 1], [6, 1, 9, 30]), ([100, 100], [16, 1])],
)
def test_equals_the_stock_backend(prefix: list[int], new: list[int], kv_heads: int) -> None:
    stock, ours = both(prefix, new, kv_heads)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_long_prefixes_take_our_path(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    sdpa = torch_native.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(query.shape))
        return sdpa(query, *args, **kwargs)

    monkeypatch.setattr(torch_native, "scaled_dot_product_attention", spy)
    both([200, 90], [3, 1])
    assert shapes == [(1, HEADS, 3, HEAD_SIZE), (1, HEADS, 1, HEAD_SIZE)]


@pytest.mark.parametrize("kwargs", [{"causal": False}, {"is_cross_attn": True}, {"sliding_window_size": 4}])
def test_other_kinds_of_attention_stay_with_the_stock_code(kwargs: dict[str, Any]) -> None:
    called: list[Any] = []
    args = inputs([4], [2], HEADS)
    extend_real_rows(lambda *got, **more: called.append((got, more)), "backend", *args, **{"causal": True, **kwargs})
    assert len(called) == 1
