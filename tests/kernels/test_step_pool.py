"""step_pool: each implementation against a float64 loop, odd shapes, errors, and which implementation ran."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from sglang_ets.kernels import step_pool
from sglang_ets.kernels.dispatch import INTERPRETED, MAX_HIDDEN
from sglang_ets.kernels.traffic import step_pool_traffic

from tests.kernels.conftest import with_dtypes

Counting = Callable[[], AbstractContextManager]  # the fixture of conftest.py
module = importlib.import_module("sglang_ets.kernels.step_pool")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreter.py, under TRITON_INTERPRET=1")
TOLERANCE = 1e-6
RAGGED = (0, 1, 1, 9, 9, 14)  # lengths 1, 0, 8, 0, 5: below, at and above the rows the kernel loads per turn


def oracle(hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    pooled = []
    for start, end in itertools.pairwise(offsets.tolist()):
        mean = torch.zeros(hidden.shape[1], dtype=torch.float64)
        if end > start:
            mean = hidden[start:end].double().mean(dim=0)
        pooled.append(mean / max(float(mean.norm()), 1e-12))
    return torch.stack(pooled)


def assert_pooled(hidden: torch.Tensor, offsets: torch.Tensor, backend: str) -> None:
    result = step_pool(hidden, offsets, backend=backend)
    assert result.dtype == torch.float32 and result.shape == (len(offsets) - 1, hidden.shape[1])
    torch.testing.assert_close(result.double(), oracle(hidden, offsets), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("hidden_size", "dtype"), with_dtypes(1, 128, 256, 1000, 4096, 8192))
def test_ragged_segments(backend: str, dtype: torch.dtype, hidden_size: int, generator: torch.Generator) -> None:
    hidden = (torch.randn(14, hidden_size, generator=generator) + 0.5).to(dtype)
    assert_pooled(hidden, torch.tensor(RAGGED), backend)


@pytest.mark.parametrize(("layout", "dtype"), with_dtypes("transposed", "every_other_row", "column_slice"))
def test_non_contiguous(backend: str, dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    wide = torch.randn(28, 600, generator=generator).to(dtype)
    hidden = {
        "transposed": wide[:14, :256].T.contiguous().T,
        "every_other_row": wide[::2, :256],
        "column_slice": wide[:14, 37:293],
    }[layout]
    assert not hidden.is_contiguous()
    assert_pooled(hidden, torch.tensor(RAGGED), backend)


def test_rows_outside_the_offsets_are_not_read(backend: str, generator: torch.Generator) -> None:
    hidden = torch.randn(14, 256, generator=generator)
    hidden[:2] = hidden[9:] = float("nan")
    assert_pooled(hidden, torch.tensor([2, 5, 9]), backend)


def test_strided_offsets(backend: str, generator: torch.Generator) -> None:
    offsets = torch.tensor([[value, -1] for value in RAGGED])[:, 0]
    assert_pooled(torch.randn(14, 256, generator=generator), offsets, backend)


def test_empty_segments_are_zero(backend: str) -> None:
    result = step_pool(torch.ones(3, 64), torch.tensor([0, 0, 3, 3]), backend=backend)
    assert torch.equal(result[[0, 2]], torch.zeros(2, 64))


def test_a_mean_of_zero_stays_zero_and_is_not_nan(backend: str) -> None:
    hidden = torch.ones(4, 64)
    hidden[::2] = -1.0
    assert torch.equal(step_pool(hidden, torch.tensor([0, 4]), backend=backend), torch.zeros(1, 64))


@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_segments(backend: str, num_rows: int) -> None:
    assert step_pool(torch.ones(num_rows, 64), torch.tensor([0]), backend=backend).shape == (0, 64)


def test_sums_in_float32(backend: str) -> None:
    hidden = torch.full((1024, 2), 5.0, dtype=torch.bfloat16)  # a bfloat16 sum of fives is not exact from 1280 on
    hidden[512:, 1] = 0.0
    assert_pooled(hidden, torch.tensor([0, 1024]), backend)


def test_input_is_not_mutated(backend: str, generator: torch.Generator) -> None:
    hidden, offsets = torch.randn(6, 64, generator=generator), torch.tensor([0, 6])
    before = hidden.clone(), offsets.clone()
    step_pool(hidden, offsets, backend=backend)
    assert torch.equal(hidden, before[0]) and torch.equal(offsets, before[1])


@needs_interpreter
@pytest.mark.parametrize("bad", [(-1, 2), (2, 1), (0, 7)])
def test_unchecked_bad_offsets_give_nan(bad: tuple[int, int]) -> None:
    hidden = torch.ones(6, 64)
    result = module._launch(hidden, torch.tensor(bad))
    assert bool(result.isnan().all())


@needs_interpreter
def test_one_pass_over_the_input(count_bytes: Counting) -> None:
    hidden, offsets = torch.ones(14, 300, dtype=torch.bfloat16), torch.tensor(RAGGED)
    with count_bytes() as counted:
        step_pool(hidden, offsets, backend="triton")
    traffic = step_pool_traffic(num_rows=14, hidden_size=300, num_segments=5, dtype=torch.bfloat16)
    assert counted.total == traffic.requested_bytes


@pytest.mark.parametrize("chosen", [None, "reference", pytest.param("triton", marks=needs_interpreter)])
def test_which_implementation_runs(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(module, "step_pool_reference", lambda *_: ran.append("reference"))
    monkeypatch.setattr(module, "_launch", lambda *_: ran.append("triton"))
    step_pool(torch.ones(2, 64), torch.tensor([0, 2]), backend=chosen)
    assert ran == [chosen or "reference"]


HIDDEN, OFFSETS = torch.ones(4, 8), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("hidden", "offsets", "message"),
    [
        (torch.ones(4), OFFSETS, "hidden must be a 2-D"),
        (torch.ones(4, 8, dtype=torch.int32), OFFSETS, "float32, float16 or bfloat16"),
        (torch.ones(4, 8, dtype=torch.float64), OFFSETS, "float32, float16 or bfloat16"),
        (torch.ones(4, 0), OFFSETS, "1 to 16384 columns, got 0"),
        (torch.ones(1, 1).expand(4, MAX_HIDDEN + 1), OFFSETS, "got 16385"),
        (HIDDEN, OFFSETS.int(), "offsets must be a 1-D int64"),
        (HIDDEN, OFFSETS.unsqueeze(0), "offsets must be a 1-D int64"),
        (HIDDEN, torch.tensor([], dtype=torch.int64), "one value more than there are segments"),
        (HIDDEN, torch.tensor([0, 3, 2, 4]), r"must not decrease.*\[0, 3, 2, 4\]"),
        (HIDDEN, torch.tensor([-1, 4]), r"must lie in 0\.\.4"),
        (HIDDEN, torch.tensor([0, 5]), r"must lie in 0\.\.4"),
        (HIDDEN, OFFSETS.to("meta"), "offsets must be on the CPU or on cpu, got meta"),
    ],
)
def test_errors(hidden: torch.Tensor, offsets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_pool(hidden, offsets)
