"""Tree attention: shared stretches read once and private rests, merged, are plain attention of every row, for random trees."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_ets.kernels.dispatch import INTERPRETED
from sglang_ets.kernels.tree_attention import (
    EMPTY,
    ITEM_FIELDS,
    ITEMS_PER_ROW,
    TILE_ROWS,
    Partials,
    SharedWork,
    merge_partials,
    shared_partials,
    work_items,
)

from sglang_ets.core.attention_plan import AttentionPlan, plan_paths
from tests.kernels.conftest import with_dtypes

module = importlib.import_module("sglang_ets.kernels.tree_attention")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreter.py, under TRITON_INTERPRET=1")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PRIVATE_SLOTS, SHARED_SLOTS = 2, 16


@dataclass(frozen=True)
class Batch:
    """A decode batch over a scattered pool, and the plan of what its rows share."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor
    table_rows: torch.Tensor
    lengths: list[int]
    plan: AttentionPlan
    scale: float

    @property
    def items(self) -> torch.Tensor:
        group = self.query.shape[1] // self.keys.shape[1]
        slots = {"first_slot": PRIVATE_SLOTS, "num_slots": SHARED_SLOTS}
        tile = TILE_ROWS[self.query.dtype] // group
        return torch.from_numpy(work_items(self.plan.spans, num_rows=len(self.lengths), tile=tile, **slots))

    def partials(self) -> Partials:
        rows, heads, _ = self.query.shape
        slots = PRIVATE_SLOTS + SHARED_SLOTS
        return Partials.empty(rows + 3, heads, slots, self.values.shape[2], self.query.device)

    def shared(self, partials: Partials, backend: str, items: torch.Tensor | None = None) -> None:
        order = torch.from_numpy(self.plan.order).int()
        tensors = (self.query, self.keys, self.values, self.page_table, self.table_rows)
        work = SharedWork(*tensors, self.items if items is None else items, order, partials, self.scale)
        shared_partials(work, backend=backend or None)

    def scores_and_values(self, row: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64, from position `start` on: [heads, positions] and [positions, heads, size]."""
        slots = self.page_table[self.table_rows[row], start : self.lengths[row]].long()
        group = self.query.shape[1] // self.keys.shape[1]
        keys, values = (cache[slots].double().repeat_interleave(group, dim=1) for cache in (self.keys, self.values))
        return torch.einsum("hd,nhd->hn", self.query[row].double(), keys) * self.scale, values

    def write_private(self, partials: Partials) -> None:
        """What the stock kernel does: the rest of each row in two pieces, the second of which may be none."""
        for row, start in enumerate(self.plan.private_from.tolist()):
            scores, values = self.scores_and_values(row, start)
            half = -(-scores.shape[1] // 2)
            for slot, (part, rest) in enumerate(zip(scores.split(half, 1), values.split(half, 0), strict=True)):
                partials.lse[row, :, slot] = part.logsumexp(-1).float()
                partials.out[row, :, slot] = torch.einsum("hn,nhd->hd", part.softmax(-1), rest).float()

    def attention(self) -> torch.Tensor:
        parts = [self.scores_and_values(row, 0) for row in range(len(self.lengths))]
        return torch.stack([torch.einsum("hn,nhd->hd", scores.softmax(-1), values) for scores, values in parts])


def tree_batch(
    paths: list[list[tuple[str, int]]],  # per row, names and lengths of the stretches before its own
    own: list[int],  # tokens of each row alone, at least one
    *,
    group: int = 4,
    kv_heads: int = 2,
    sizes: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    least: int = 16,
    seed: int = 0,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    spans = []
    for path in paths:
        ends = np.cumsum([length for _, length in path]).tolist()
        spans.append([(name, end - length, end) for (name, length), end in zip(path, ends, strict=True)])
    lengths = [(path[-1][2] if path else 0) + length for path, length in zip(spans, own, strict=True)]
    stretches = {span for path in spans for span in path}
    pool = sum(end - start for _, start, end in stretches) + sum(own)
    free = iter(torch.randperm(pool, generator=generator).tolist())
    slots = {span: [next(free) for _ in range(span[2] - span[1])] for span in sorted(stretches)}
    table = torch.zeros(len(paths) + 2, max(lengths) + 1, dtype=torch.int32)
    rows = torch.randperm(len(paths) + 2, generator=generator)[: len(paths)]
    for row, (path, length) in enumerate(zip(spans, own, strict=True)):
        pages = [slot for span in path for slot in slots[span]] + [next(free) for _ in range(length)]
        table[rows[row], : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    keys, values = (torch.randn(pool, kv_heads, size, generator=generator).to(dtype) for size in sizes)
    query = torch.randn(len(paths), kv_heads * group, sizes[0], generator=generator).to(dtype)
    plan = plan_paths(spans, min_saved_tokens=least)
    return Batch(query, keys, values, table, rows, lengths, plan, sizes[0] ** -0.5)


def assert_attends(batch: Batch, backend: str) -> None:
    partials = batch.partials()
    batch.shared(partials, backend)
    assert_merges(batch, partials, backend)


def assert_merges(batch: Batch, partials: Partials, backend: str) -> None:
    """With what is private, the shared partial results are attention."""
    output = batch.query.new_empty(*batch.query.shape[:2], batch.values.shape[2])
    batch.write_private(partials)
    merge_partials(partials, output, backend=backend)
    tolerance = TOLERANCE[batch.query.dtype]
    torch.testing.assert_close(output.double(), batch.attention(), atol=tolerance, rtol=tolerance)
    assert bool((partials.lse == EMPTY).all()), "the next layer finds the buffers empty"


def search_rows(width: int, prompt: int, step: int = 20) -> tuple[list[list[tuple[str, int]]], list[int]]:
    """Rows of a search: one prompt, then pairs of rows with a step in common."""
    paths = [[("prompt", prompt), (f"step {row // 2}", step)] for row in range(width)]
    return paths, [1 + row % 7 for row in range(width)]


@pytest.mark.parametrize(("group", "dtype"), with_dtypes(1, 4, 8, 7))
def test_rows_of_a_search(backend: str, dtype: torch.dtype, group: int) -> None:
    assert_attends(tree_batch(*search_rows(10, 150), group=group, dtype=dtype), backend)


@pytest.mark.parametrize("sizes", [(8, 8), (24, 24), (64, 32)])
def test_head_sizes(backend: str, sizes: tuple[int, int]) -> None:
    assert_attends(tree_batch(*search_rows(4, 70), sizes=sizes), backend)


def test_more_rows_than_a_tile_holds(backend: str) -> None:
    batch = tree_batch(*search_rows(22, 30), group=8, kv_heads=1)
    assert len({item[2] for item in batch.items.tolist()}) > 9, "tiles of one segment begin at several places"
    assert_attends(batch, backend)


def test_several_searches_and_ordinary_rows(backend: str) -> None:
    paths = [[("a", 90), ("a1", 40)]] * 3 + [[("b", 33)]] * 2 + [[]] + [[("a", 90), ("a2", 50)]] * 2
    assert_attends(tree_batch(paths, [3, 1, 64, 2, 2, 100, 1, 5]), backend)


def test_nothing_shared(backend: str) -> None:
    batch = tree_batch([[], [], []], [4, 1, 9])
    assert batch.items.shape == (0, ITEM_FIELDS)
    assert_attends(batch, backend)


def test_items_that_end_where_they_start_do_nothing(backend: str) -> None:
    batch = tree_batch(*search_rows(6, 50))
    buffer = torch.zeros(ITEMS_PER_ROW * 6, ITEM_FIELDS, dtype=torch.int32)
    buffer[: len(batch.items)] = batch.items
    exact, padded = batch.partials(), batch.partials()
    batch.shared(exact, backend)
    batch.shared(padded, backend, buffer)
    assert torch.equal(exact.lse, padded.lse) and torch.equal(exact.out, padded.out)


def test_rows_of_the_buffers_beyond_the_batch_stay_as_they_are(backend: str) -> None:
    batch = tree_batch(*search_rows(4, 40))
    partials = batch.partials()
    partials.lse[4:] = 1.0
    batch.shared(partials, backend)
    batch.write_private(partials)
    merge_partials(partials, torch.empty_like(batch.query), backend=backend)
    assert bool((partials.lse[4:] == 1.0).all())


@needs_interpreter
@pytest.mark.parametrize(("group", "seed"), [(1, 0), (4, 1), (8, 2)])
def test_the_kernel_writes_what_the_reference_writes(dtype: torch.dtype, group: int, seed: int) -> None:
    """Random forests: stretches of any length from none on, rows that end anywhere, duplicates."""
    random = np.random.default_rng(seed)
    paths: list[list[tuple[str, int]]] = [[]]
    for node in range(12):
        paths.append([*paths[random.integers(len(paths))], (f"{node}", int(random.integers(0, 150)))])
    chosen = [paths[place] for place in random.integers(len(paths), size=9)]
    own = random.integers(1, 40, size=9).tolist()
    batch = tree_batch(chosen, own, group=group, dtype=dtype, seed=seed)
    results = {backend: batch.partials() for backend in ("reference", "triton")}
    for backend, partials in results.items():
        batch.shared(partials, backend)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(results["triton"].lse, results["reference"].lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results["triton"].out, results["reference"].out, atol=tolerance, rtol=tolerance)
    assert_merges(batch, results["triton"], "triton")


# ---- the work ----


@st.composite
def plans(draw: st.DrawFn) -> AttentionPlan:
    parents = draw(st.lists(st.integers(-1, 30), min_size=1, max_size=30))
    paths: list[list[tuple[str, int, int]]] = [[]]
    for node, parent in enumerate(parents):
        above = paths[(parent + 1) % len(paths)]
        start = above[-1][2] if above else 0
        paths.append([*above, (f"node {node}", start, start + draw(st.integers(0, 900)))])
    rows = draw(st.lists(st.sampled_from(paths), min_size=1, max_size=40))
    return plan_paths(rows, min_saved_tokens=draw(st.sampled_from([1, 256])))


@settings(max_examples=200)
@given(plans(), st.integers(2, 64), st.sampled_from([4, 8, 16]))
def test_items_cover_each_shared_position_of_each_row_once_in_slots_of_its_own(
    plan: AttentionPlan, tile: int, num_slots: int
) -> None:
    num_rows = len(plan.order)
    items = work_items(plan.spans, num_rows=num_rows, tile=tile, first_slot=8, num_slots=num_slots)
    assert len(items) <= ITEMS_PER_ROW * num_rows
    covered: list[list[int]] = [[] for _ in range(num_rows)]
    slots: list[list[int]] = [[] for _ in range(num_rows)]
    for start, end, first, count, slot in items.tolist():
        assert start < end and 0 < count <= tile and 8 <= slot < 8 + num_slots
        for row in plan.order[first : first + count].tolist():
            covered[row] += range(start, end)
            slots[row].append(slot)
    assert [sorted(places) for places in covered] == [list(range(end)) for end in plan.private_from.tolist()]
    assert all(len(set(used)) == len(used) for used in slots)


def test_a_long_prompt_is_split_and_a_short_one_is_not() -> None:
    spans = np.array([[0, 1000, 0, 4], [1000, 1100, 0, 2]])
    items = work_items(spans, num_rows=4, tile=16, first_slot=8, num_slots=16).tolist()
    assert [item[:2] for item in items] == [[0, 250], [250, 500], [500, 750], [750, 1000], [1000, 1100]]
    assert [item[-1] for item in items] == [8, 9, 10, 11, 12]


def test_more_segments_than_slots_are_refused() -> None:
    spans = np.array([[at, at + 1, 0, 2] for at in range(5)])
    with pytest.raises(ValueError, match="items up to slot 12; expected at most 8 in slots 8 to 11"):
        work_items(spans, num_rows=2, tile=16, first_slot=8, num_slots=4)


# ---- which implementation, and errors ----


def test_the_reference_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(module, "shared_partials_reference", lambda *_args: called.append("shared"))
    monkeypatch.setattr(module, "merge_partials_reference", lambda *_args: called.append("merge"))
    batch = tree_batch(*search_rows(2, 20))
    batch.shared(batch.partials(), "")
    merge_partials(batch.partials(), torch.empty_like(batch.query))
    assert called == ["shared", "merge"]


@needs_interpreter
def test_triton_runs_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_args: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(module, "shared_partials_reference", unexpected)
    monkeypatch.setattr(module, "merge_partials_reference", unexpected)
    assert_attends(tree_batch(*search_rows(2, 20)), "triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": (2, 8)}, "one size of query and key"),
        ({"keys": torch.float16}, "must have one dtype, got torch.float32, torch.float16"),
        ({"values": "strided"}, "must be contiguous"),
        ({"keys": (3, 16)}, "1 to 8 query heads in torch.float32, got 8 and 3"),
        ({"values": (2, 24)}, r"partial results must be \[>= 2, 8, slots, 24\], got \(5, 8, 18, 16\)"),
    ],
)
def test_errors_name_rule_value_and_remedy(changes: dict[str, object], message: str) -> None:
    batch = tree_batch(*search_rows(2, 20))
    partials = batch.partials()
    ((name, change),) = changes.items()
    tensor = getattr(batch, name)
    match change:
        case torch.dtype():
            changed = tensor.to(change)
        case tuple():
            changed = torch.zeros(len(tensor), *change)
        case _:
            changed = torch.zeros(len(tensor), 2, 32)[..., ::2]
    with pytest.raises(ValueError, match=message):
        replace(batch, **{name: changed}).shared(partials, "reference", batch.items)


def test_a_batch_of_more_rows_than_the_buffers_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 5 rows, got"):
        merge_partials(tree_batch(*search_rows(2, 20)).partials(), torch.zeros(6, 8, 16))
