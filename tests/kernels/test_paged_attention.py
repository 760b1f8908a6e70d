"""Paged attention on the CPU: the Numba kernel gives the reference's results, which dense attention gives too."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from sglang_ets.kernels import PagedBatch, layout_of, paged_attention, paged_attention_reference, slow_path_reason
from sglang_ets.kernels.traffic import paged_attention_traffic

from sglang_ets.core.attention_plan import AttentionPlan, Span, plan_paths

module = importlib.import_module(paged_attention.__module__)  # by name: the package's attribute is the function
POOL = 900
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[int], list[int], list[int]]
SHAPES = [
    ([1], [1]),
    ([7], [7]),
    ([10], [1]),
    ([38], [5]),
    ([6, 41, 21, 31], [6, 1, 9, 30]),
    ([116, 101], [16, 1]),
    ([64, 65, 128, 17], [1, 1, 1, 2]),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What is left of an output's own rounding, to nearest, when sums are kept in float32.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


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


def cast(args: Case, dtype: torch.dtype) -> Case:
    query, output, keys, values, *rest = args
    return (query.to(dtype), output.to(dtype), keys.to(dtype), values.to(dtype), *rest)  # type: ignore[return-value]


def tree(
    num_rows: int, depth: int, longest: int, heads: int, kv_heads: int, seed: int = 0
) -> tuple[Case, list[list[Span]]]:
    """One new token for each of `num_rows` rows at random leaves of a random tree, and their paths.

    Steps have 1 to `longest` tokens, rows 1 to 2 * `longest` of their own. The rows of one node share its slots.
    """
    random = np.random.default_rng(seed)
    slots: list[list[int]] = [[]]
    paths: list[list[Span]] = [[]]
    pool = 1
    for node in range(num_rows):
        up = int(random.choice([at for at, path in enumerate(paths) if len(path) < depth]))
        length = int(random.integers(1, longest + 1))
        start = len(slots[up])
        paths.append([*paths[up], (node, start, start + length)])
        slots.append([*slots[up], *range(pool, pool + length)])
        pool += length
    ends = random.integers(0, len(paths), num_rows).tolist()
    own = random.integers(1, 2 * longest + 1, num_rows).tolist()
    kv = [len(slots[end]) + more for end, more in zip(ends, own, strict=True)]
    pages = torch.zeros(num_rows, max(kv), dtype=torch.int32)
    for row, (end, more) in enumerate(zip(ends, own, strict=True)):
        pages[row, : kv[row]] = torch.tensor([*slots[end], *range(pool, pool + more)])
        pool += more
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_rows, heads, 32, generator=generator)
    keys, values = (torch.randn(pool, kv_heads, 32, generator=generator) for _ in range(2))
    args = (query, torch.full_like(query, math.nan), keys, values, pages, list(range(num_rows)), kv, [1] * num_rows)
    return args, [paths[end] for end in ends]


@pytest.fixture
def kernel_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the Numba kernel was given."""
    calls: list[int] = []
    kernel = module.attend

    def spy(*args: object) -> None:
        calls.append(len(args[5]))  # type: ignore[arg-type]
        kernel(*args)

    monkeypatch.setattr(module, "attend", spy)
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
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (4, 2, 16, 16), (6, 1, 48, 32), (2, 2, 80, 144), (2, 2, 3, 5)])
@pytest.mark.parametrize(("kv", "new"), SHAPES)
def test_equals_dense_attention(run, scaling, heads, kv, new) -> None:  # type: ignore[no-untyped-def]
    args = case(kv, new, *heads)
    run(PagedBatch(*args, scaling))
    torch.testing.assert_close(args[1].double(), dense(args, scaling), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2, 16, 16), (6, 1, 48, 80)])
@pytest.mark.parametrize(("kv", "new"), [([30, 20], [1, 2]), ([1], [1]), ([65, 130], [16, 1])])
def test_half_precision_goes_to_the_kernel_and_is_rounded_once(  # type: ignore[no-untyped-def]
    dtype, heads, kv, new, kernel_tokens: list[int]
) -> None:
    args = cast(case(kv, new, *heads), dtype)
    paged_attention(PagedBatch(*args))
    assert kernel_tokens == [sum(new)]
    torch.testing.assert_close(args[1].double(), dense(args, None), rtol=RELATIVE[dtype], atol=1e-6)
    ours, reference = args[1].clone(), args[1]
    paged_attention_reference(PagedBatch(*args))
    # Torch may round the weights, too.
    torch.testing.assert_close(ours, reference, rtol=4 * RELATIVE[dtype], atol=4 * RELATIVE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_may_be_wider_than_the_pools(dtype: torch.dtype, kernel_tokens: list[int]) -> None:
    query, output, keys, values, *rest = case([30, 20], [1, 2])
    args = (query, output, keys.to(dtype), values.to(dtype), *rest)
    paged_attention(PagedBatch(*args))
    assert kernel_tokens == [3]
    torch.testing.assert_close(args[1].double(), dense(args, None), rtol=1e-5, atol=1e-6)


def test_every_float16_is_read_as_it_is() -> None:
    """One position has weight 1: the output is its value, subnormal ones and infinity among them."""
    query, output, keys, _, pages, rows, kv, new = case([1] * 10, [1] * 10)
    keys = keys.half()
    numbers = [0.0, -0.0, 2**-24, -(2**-24), 6.0975e-5, 2**-14, 1.0, -65504.0, math.inf, 0.333251953125]
    values = torch.zeros(POOL, 2, 16, dtype=torch.float16)
    for row, number in zip(rows, numbers, strict=True):
        values[pages[row, 0]] = number
    paged_attention(PagedBatch(query, output, keys, values, pages, rows, kv, new))
    expected = torch.tensor(numbers, dtype=torch.float16).float()
    assert torch.equal(output[:, 0, 0], expected)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    query, output, keys, values, pages, rows, kv, new = cast(case([60, 145, 12, 50], [1, 3, 1, 2], 6, 2), dtype)
    paged_attention(PagedBatch(query, output, keys, values, pages, rows, kv, new))
    token = 0
    for at in range(4):
        own = slice(token, token + new[at])
        alone = torch.empty_like(output[own])
        paged_attention(
            PagedBatch(query[own], alone, keys, values, pages, rows[at : at + 1], kv[at : at + 1], new[at : at + 1])
        )
        assert torch.equal(alone, output[own])
        token += new[at]


def test_new_tokens_together_or_one_by_one_give_the_same_bits() -> None:
    query, together, *pools, rows, kv, new = case([131], [9])
    paged_attention(PagedBatch(query, together, *pools, rows, kv, new))
    for token in range(9):
        alone = torch.empty_like(together[:1])
        paged_attention(PagedBatch(query[token : token + 1], alone, *pools, rows, [131 - 8 + token], [1]))
        assert torch.equal(alone[0], together[token])


def test_a_token_does_not_touch_what_comes_after_it() -> None:
    args = case([40], [5])
    args[3][args[4][args[5][0], 39]] = math.inf  # the value of the last token
    paged_attention(PagedBatch(*args))
    assert torch.isfinite(args[1][:4]).all()


def planned(args: Case, plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The output with the plan and without."""
    batch = PagedBatch(*args)
    with_plan = torch.full_like(batch.output, math.nan)
    paged_attention(replace(batch, output=with_plan, layout=layout_of(*args[5:], plan)))
    paged_attention(batch)
    return with_plan, batch.output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (16, 2)])
@pytest.mark.parametrize(
    ("num_rows", "depth", "longest"), [(1, 1, 5), (2, 1, 1), (7, 3, 1), (33, 5, 40), (150, 9, 10), (20, 2, 200)]
)
@pytest.mark.parametrize(("least", "most"), [(1, 100), (64, 4), (10**9, 4)])
def test_a_plan_changes_no_bit(dtype, heads, num_rows, depth, longest, least, most) -> None:  # type: ignore[no-untyped-def]
    args, paths = tree(num_rows, depth, longest, *heads, seed=num_rows)
    with_plan, without = planned(cast(args, dtype), plan_paths(paths, min_saved_tokens=least, max_segments=most))
    assert torch.equal(with_plan, without)


def test_a_planned_row_equals_dense_attention() -> None:
    args, paths = tree(40, 4, 60, 8, 1)
    plan = plan_paths(paths, min_saved_tokens=1)
    assert plan.saved_tokens > 0
    with_plan, _ = planned(args, plan)
    torch.testing.assert_close(with_plan.double(), dense(args, None), rtol=1e-5, atol=1e-6)


def test_a_shared_segment_is_read_from_one_row_only() -> None:
    """Slots of the other rows may say anything there: the plan is what is followed."""
    args, paths = tree(30, 3, 50, 4, 2)
    plan = plan_paths(paths, min_saved_tokens=1)
    expected, _ = planned(args, plan)
    for segment in plan.segments():
        args[4][list(segment.rows[1:]), segment.start : segment.end] = 0
    paged_attention(replace(PagedBatch(*args), output=args[1].fill_(math.nan), layout=layout_of(*args[5:], plan)))
    assert torch.equal(args[1], expected)


def test_a_plan_is_read_once_a_pass() -> None:
    """70 rows share 100 tokens and have 3 of their own: two passes of at most 64 tokens."""
    lengths = (list(range(70)), [103] * 70, [1] * 70)
    plan = plan_paths([[("prompt", 0, 100)]] * 70)
    alone, planned = layout_of(*lengths).kv_tokens_read, layout_of(*lengths, plan).kv_tokens_read
    assert (alone, planned) == (70 * 103, 2 * 100 + 70 * 3)
    shape = {"num_tokens": 70, "num_heads": 4, "num_kv_heads": 2, "head_size": 16, "dtype": torch.bfloat16}
    traffic = paged_attention_traffic(kv_tokens_read=planned, kv_tokens_distinct=310, **shape)
    own = 2 * 70 * 4 * 16 * 4
    assert (traffic.requested_bytes, traffic.lower_bound_bytes) == (planned * 128 + own, 310 * 128 + own)


@pytest.mark.usefixtures("threads")
def test_threads_share_a_plan(kernel_tokens: list[int]) -> None:
    args, paths = tree(50, 5, 40, 4, 2)
    with_plan, without = planned(args, plan_paths(paths, min_saved_tokens=1))
    assert sorted(kernel_tokens) == [16, 16, 17, 17, 17, 17]
    assert torch.equal(with_plan, without)


def test_sequences_of_a_plan_may_have_several_new_tokens() -> None:
    pages = torch.tensor([[1, 2, 3, 4, 5, 6, 0], [1, 2, 3, 4, 7, 8, 9]], dtype=torch.int32)
    query, output, keys, values, *_ = case([1] * 5, [1] * 5)
    plan = plan_paths([[("prompt", 0, 4)]] * 2, min_saved_tokens=1)
    args = (query, output, keys, values, pages, [1, 0], [7, 6], [3, 2])
    with_plan, without = planned(args, plan)
    assert torch.equal(with_plan, without)
    torch.testing.assert_close(without.double(), dense(args, None), rtol=1e-5, atol=1e-6)


def test_a_plan_of_another_batch_is_refused() -> None:
    args, paths = tree(5, 2, 9, 2, 2)
    plan = plan_paths([*paths, paths[0]], min_saved_tokens=1)
    with pytest.raises(ValueError, match="plan is of 6 sequences, but the batch has 5"):
        layout_of(*args[5:], plan)
    plan = plan_paths([[("all", 0, 9)]] * 2, min_saved_tokens=1)
    with pytest.raises(ValueError, match="shares 9 tokens of sequence 1, but only 8 are cached"):
        layout_of([0, 1], [12, 9], [1, 1], plan)


def test_query_may_be_a_view(kernel_tokens: list[int]) -> None:
    args = case([30, 20], [1, 1])
    wide = torch.randn(2, 4, 48)
    view = wide[:, :, 16:32]
    paged_attention(PagedBatch(view, *args[1:]))
    assert kernel_tokens == [2]
    torch.testing.assert_close(args[1].double(), dense((view.clone(), *args[1:]), None), rtol=1e-5, atol=1e-6)


def wrong_dtype(args: Case) -> Case:
    return cast(args, torch.float64)


def wrong_pair(args: Case) -> Case:
    return (*args[:3], args[3].half(), *args[4:])  # type: ignore[return-value]


def wrong_slots(args: Case) -> Case:
    return (*args[:4], args[4].long(), *args[5:])  # type: ignore[return-value]


def wrong_layout(args: Case) -> Case:
    return (*args[:2], args[2].transpose(0, 1).contiguous().transpose(0, 1), *args[3:])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "heads", "reason"),
    [
        (wrong_dtype, (4, 2, 16, 16), "the query is float64; the kernel takes float32, bfloat16, float16"),
        (wrong_pair, (4, 2, 16, 16), "the key pool is float32 and the value pool float16; the kernel takes one dtype"),
        (wrong_slots, (4, 2, 16, 16), "the slots are int64; the kernel takes int32"),
        (wrong_layout, (4, 2, 16, 16), "a pool is not contiguous"),
        (tuple, (4, 2, 16, 24), "the head size of the output is 24; the kernel takes multiples of 16"),
    ],
)
def test_the_slow_path_serves_and_says_why(change, heads, reason, kernel_tokens: list[int]) -> None:  # type: ignore[no-untyped-def]
    args = change(case([30, 20], [1, 2], *heads))
    assert slow_path_reason(PagedBatch(*args)) == reason
    paged_attention(PagedBatch(*args))
    assert kernel_tokens == []
    torch.testing.assert_close(args[1].double(), dense(args, None), rtol=1e-3, atol=1e-3)


def test_no_reason_where_the_kernel_serves() -> None:
    batch = PagedBatch(*case([30, 20], [1, 2]))
    assert slow_path_reason(batch) is None
    elsewhere = replace(batch, k_cache=batch.k_cache.to("meta"))
    assert slow_path_reason(elsewhere) == "the key pool is on meta; the kernel reads memory of the CPU"


def test_very_large_scores_do_not_overflow() -> None:
    query, *rest = case([30], [1])
    paged_attention(PagedBatch(query * 1e4, *rest))
    assert torch.isfinite(rest[0]).all()


def test_a_score_that_is_no_number_stays_visible() -> None:
    query, *rest = case([30, 30], [1, 1])
    query[0] = math.nan
    paged_attention(PagedBatch(query, *rest))
    assert rest[0][0].isnan().all() and rest[0][1].isfinite().all()
