"""Paged attention on the CPU: the Numba kernel gives the reference's results, which dense attention gives too."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from sglang_ets.kernels import PagedBatch, paged_attention, paged_attention_reference

module = importlib.import_module(paged_attention.__module__)  # by name: the package's attribute is the function
POOL = 900
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[int], list[int], list[int]]
SHAPES = [([1], [1]), ([7], [7]), ([10], [1]), ([38], [5]), ([6, 41, 21, 31], [6, 1, 9, 30]), ([116, 101], [16, 1])]


def case(
    kv: list[int], new: list[int], heads: int = 4, kv_heads: int = 2, size: int = 16, value_size: int = 16
) -> Case:
    """Sequences scattered over the pool, in rows of req_to_token that are not in order."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.zeros(len(kv) + 2, max(kv) + 3, dtype=torch.int32)
    slots = torch.randperm(POOL, generator=generator).to(torch.int32).split([*kv, POOL - sum(kv)])
    rows = [len(kv) - at for at in range(len(kv))]
    for row, found in zip(rows, slots, strict=False):
        pages[row, : len(found)] = found
    query = torch.randn(sum(new), heads, size, generator=generator)
    keys = torch.randn(POOL, kv_heads, size, generator=generator)
    values = torch.randn(POOL, kv_heads, value_size, generator=generator)
    return query, torch.full((sum(new), heads, value_size), math.nan), keys, values, pages, rows, kv, new


@pytest.fixture
def kernel_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the Numba kernel was given."""
    calls: list[int] = []
    kernel = module._attend_rows

    def spy(query: object, *rest: object) -> None:
        calls.append(len(query))  # type: ignore[arg-type]
        kernel(query, *rest)

    monkeypatch.setattr(module, "_attend_rows", spy)
    return calls


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def dense(args: Case, scaling: float | None) -> torch.Tensor:
    """The definition, one token and one head at a time, in float64."""
    query, output, keys, values, pages, rows, kv, new = args
    expected = torch.zeros_like(output, dtype=torch.float64)
    token = 0
    for row, num_kv, num_new in zip(rows, kv, new, strict=True):
        for at in range(num_new):
            seen = pages[row, : num_kv - num_new + at + 1].long()
            for head in range(query.shape[1]):
                kv_head = head * keys.shape[1] // query.shape[1]
                scores = keys[seen, kv_head].double() @ query[token, head].double()
                weights = torch.softmax(scores * (scaling or query.shape[2] ** -0.5), 0)
                expected[token, head] = weights @ values[seen, kv_head].double()
            token += 1
    return expected


@pytest.mark.parametrize("run", [paged_attention, paged_attention_reference])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (4, 2, 16, 16), (6, 1, 40, 24), (2, 2, 3, 5)])
@pytest.mark.parametrize(("kv", "new"), SHAPES)
def test_equals_dense_attention(run, scaling, heads, kv, new) -> None:  # type: ignore[no-untyped-def]
    args = case(kv, new, *heads)
    run(PagedBatch(*args, scaling))
    torch.testing.assert_close(args[1].double(), dense(args, scaling), rtol=1e-5, atol=1e-6)


def test_short_sequences_go_to_the_kernel_and_long_ones_to_torch(kernel_tokens: list[int]) -> None:
    paged_attention(PagedBatch(*case([30, 20, 9], [1, 1, 1])))
    assert kernel_tokens == [3]
    paged_attention(PagedBatch(*case([90, 20], [module.FEW_NEW_TOKENS + 1, 2])))
    assert kernel_tokens == [3, 2]


@pytest.mark.usefixtures("threads")
def test_threads_share_the_tokens(kernel_tokens: list[int]) -> None:
    args = case([30, 20, 9, 40], [2, 1, 3, 1])
    paged_attention(PagedBatch(*args))
    assert sorted(kernel_tokens) == [2, 2, 3]
    torch.testing.assert_close(args[1].double(), dense(args, None), rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch() -> None:
    query, output, keys, values, pages, rows, kv, new = case([60, 45, 12, 50], [1, 1, 1, 1])
    paged_attention(PagedBatch(query, output, keys, values, pages, rows, kv, new))
    for at in range(4):
        alone = torch.empty_like(output[:1])
        paged_attention(
            PagedBatch(query[at : at + 1], alone, keys, values, pages, rows[at : at + 1], kv[at : at + 1], [1])
        )
        assert torch.equal(alone[0], output[at])


def test_query_may_be_a_view(kernel_tokens: list[int]) -> None:
    args = case([30, 20], [1, 1])
    wide = torch.randn(2, 4, 48)
    view = wide[:, :, 16:32]
    paged_attention(PagedBatch(view, *args[1:]))
    assert kernel_tokens == [2]
    torch.testing.assert_close(args[1].double(), dense((view.clone(), *args[1:]), None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_go_to_torch(dtype: torch.dtype, kernel_tokens: list[int]) -> None:
    *floats, pages, rows, kv, new = case([30, 20], [1, 2])
    args = (*(one.to(dtype) for one in floats), pages, rows, kv, new)
    paged_attention(PagedBatch(*args))
    assert kernel_tokens == []
    torch.testing.assert_close(args[1].double(), dense(args, None), rtol=2e-2, atol=2e-2)


def test_very_large_scores_do_not_overflow() -> None:
    query, *rest = case([30], [1])
    paged_attention(PagedBatch(query * 1e4, *rest))
    assert torch.isfinite(rest[0]).all()
