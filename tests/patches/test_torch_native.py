"""Attention of the stock CPU backend and ours give the same results; ours computes the new tokens only, in one call."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang_ets.kernels import PagedBatch
from sglang_ets.patches.torch_native import ForwardPass, decode, extend

HEADS, HEAD_SIZE, POOL = 4, 16, 600
STOCK = TorchNativeAttnBackend._run_sdpa_forward_extend
STOCK_DECODE = TorchNativeAttnBackend._run_sdpa_forward_decode
BACKEND = SimpleNamespace(_make_sliding_window_mask=TorchNativeAttnBackend._make_sliding_window_mask)


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


def both(prefix: list[int], new: list[int], kv_heads: int = HEADS) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"scaling": 0.3, "enable_gqa": kv_heads != HEADS, "causal": True}
    stock = STOCK(BACKEND, *inputs(prefix, new, kv_heads), **settings)
    return stock, extend(not_called, BACKEND, *inputs(prefix, new, kv_heads), **settings)


def decode_inputs(lengths: list[int], kv_heads: int) -> list[Any]:
    *tensors, rows, kv_lengths, _, _, _ = inputs([length - 1 for length in lengths], [1] * len(lengths), kv_heads)
    return [*tensors, rows, kv_lengths, None]


def not_called(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    raise AssertionError("the stock code was called")


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(
    ("prefix", "new"),
    [([0], [1]), ([0], [7]), ([9], [1]), ([33], [5]), ([0, 40, 12, 1], [6, 1, 9, 30]), ([100, 100], [16, 1])],
)
def test_equals_the_stock_backend(prefix: list[int], new: list[int], kv_heads: int) -> None:
    stock, ours = both(prefix, new, kv_heads)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("lengths", [[1], [2, 1], [90, 40, 1, 17]])
def test_decode_equals_the_stock_backend(lengths: list[int], kv_heads: int) -> None:
    settings = {"scaling": 0.3, "enable_gqa": kv_heads != HEADS, "causal": False}
    stock = STOCK_DECODE(BACKEND, *decode_inputs(lengths, kv_heads), **settings)
    ours = decode(not_called, BACKEND, *decode_inputs(lengths, kv_heads), **settings)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


OTHER_KINDS = [{"is_cross_attn": True}, {"sliding_window_size": 4}]


@pytest.mark.parametrize("kwargs", [{"causal": False}, *OTHER_KINDS])
def test_other_kinds_of_extend_stay_with_the_stock_code(kwargs: dict[str, Any]) -> None:
    called: list[Any] = []
    args = inputs([4], [2], HEADS)
    extend(lambda *got, **more: called.append((got, more)), "backend", *args, **{"causal": True, **kwargs})
    assert called == [(("backend", *args), {"causal": True, **kwargs})]


@pytest.mark.parametrize("kwargs", OTHER_KINDS)
def test_other_kinds_of_decode_stay_with_the_stock_code(kwargs: dict[str, Any]) -> None:
    called: list[Any] = []
    decode(lambda *_got, **more: called.append(more), "backend", *decode_inputs([4], HEADS), **kwargs)
    assert called == [kwargs]


def test_encoder_lengths_stay_with_the_stock_code() -> None:
    called: list[int] = []
    *tensors, _ = decode_inputs([4], HEADS)
    decode(lambda *got, **_more: called.append(len(got)), "backend", *tensors, torch.tensor([2]))
    assert called == [9]


def tree_batch(num_rows: int, shared: int, own: int, layer: int = 0) -> PagedBatch:
    """One decode of rows whose first `shared` positions lie on the same pages, with one of its layers' pools."""
    generator = torch.Generator().manual_seed(layer)
    kv = shared + own + 1
    pages = torch.zeros(num_rows, kv, dtype=torch.int32)
    pages[:, :shared] = torch.arange(shared)
    pages[:, shared:] = shared + torch.arange(num_rows * (own + 1)).reshape(num_rows, own + 1)
    pools = [torch.randn(shared + num_rows * (own + 1), HEADS, HEAD_SIZE, generator=generator) for _ in range(2)]
    query = torch.randn(num_rows, HEADS, HEAD_SIZE, generator=generator)
    return PagedBatch(
        query, torch.zeros_like(query), *pools, pages, list(range(num_rows)), [kv] * num_rows, [1] * num_rows
    )


def served(backend: Any, batch: PagedBatch) -> torch.Tensor:
    """Through the hook of the decode."""
    tensors = [batch.query, torch.zeros_like(batch.query), batch.k_cache, batch.v_cache, batch.req_to_token]
    lengths = torch.tensor(batch.rows), torch.tensor(batch.kv_lengths)
    return decode(not_called, backend, *tensors, *lengths, None, scaling=None, enable_gqa=False, causal=False)


def test_rows_that_share_pages_read_them_together_and_get_the_same_bits() -> None:
    batch = tree_batch(8, shared=90, own=7)
    layout = ForwardPass().layout(batch)
    assert any(stop - start > 1 for *_, start, stop in layout.segments.tolist()), "something is shared"
    alone = [
        served(
            SimpleNamespace(), replace(batch, query=batch.query[i : i + 1], rows=[i], kv_lengths=[98], new_lengths=[1])
        )
        for i in batch.rows
    ]
    assert torch.equal(served(SimpleNamespace(), batch), torch.cat(alone))


def test_layers_of_one_pass_have_one_layout_and_the_next_pass_a_new_one() -> None:
    current = ForwardPass()
    first, second = tree_batch(4, 20, 3, layer=1), tree_batch(4, 20, 3, layer=2)
    layout = current.layout(first)
    assert current.layout(second) is layout
    moved = replace(first, req_to_token=first.req_to_token.flip(0).contiguous())
    assert current.layout(moved) is not layout, "a layer that comes again begins a pass, whatever its rows and lengths"
    assert current.layout(tree_batch(4, 20, 4, layer=3)) is not layout


def test_the_slow_path_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    batch = tree_batch(2, 4, 1)
    odd = replace(batch, k_cache=batch.k_cache.double(), v_cache=batch.v_cache.double())
    current = ForwardPass()
    for _ in range(3):
        current.layout(odd)
    (record,) = caplog.records
    assert "float64" in record.getMessage()
