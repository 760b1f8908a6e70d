"""pairwise_cosine: each implementation against float64 distances, tile edges, errors, and which implementation ran."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from sglang_ets.kernels import pairwise_cosine
from sglang_ets.kernels.dispatch import INTERPRETED
from sglang_ets.kernels.pairwise_cosine import BLOCK_N, MAX_EMBEDDINGS
from sglang_ets.kernels.traffic import pairwise_cosine_traffic

from tests.kernels.conftest import with_dtypes

Counting = Callable[[], AbstractContextManager]  # the fixture of conftest.py
module = importlib.import_module("sglang_ets.kernels.pairwise_cosine")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreter.py, under TRITON_INTERPRET=1")
TOLERANCE = 2e-6


def oracle(embeddings: torch.Tensor) -> torch.Tensor:
    rows = embeddings.double()
    norms = rows.norm(dim=1).clamp(min=1e-12)
    return (1 - (rows @ rows.T) / norms[:, None] / norms[None, :]).fill_diagonal_(0.0)


def assert_distances(embeddings: torch.Tensor, backend: str) -> None:
    result = pairwise_cosine(embeddings, backend=backend)
    assert result.dtype == torch.float32 and result.shape == (len(embeddings), len(embeddings))
    torch.testing.assert_close(result.double(), oracle(embeddings), atol=TOLERANCE, rtol=0)
    assert torch.equal(result, result.T)
    assert torch.equal(result.diagonal(), torch.zeros(len(embeddings)))
    assert float(result.min()) >= 0.0 and float(result.max()) <= 2.0


@pytest.mark.parametrize(("num_rows", "dtype"), with_dtypes(1, 2, BLOCK_N, BLOCK_N + 1, 2 * BLOCK_N + 3))
def test_tile_edges(backend: str, dtype: torch.dtype, num_rows: int, generator: torch.Generator) -> None:
    assert_distances(torch.randn(num_rows, 100, generator=generator).to(dtype), backend)


@pytest.mark.parametrize(("hidden_size", "dtype"), with_dtypes(1, 128, 256, 1000, 4096, 8192))
def test_hidden_sizes(backend: str, dtype: torch.dtype, hidden_size: int, generator: torch.Generator) -> None:
    assert_distances((torch.randn(9, hidden_size, generator=generator) + 0.3).to(dtype), backend)


def test_largest_width(backend: str, generator: torch.Generator) -> None:
    assert_distances(torch.randn(MAX_EMBEDDINGS, 16, generator=generator), backend)


@pytest.mark.parametrize(("layout", "dtype"), with_dtypes("transposed", "every_other_row", "column_slice"))
def test_non_contiguous(backend: str, dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    wide = torch.randn(80, 300, generator=generator).to(dtype)
    embeddings = {
        "transposed": wide[:40, :128].T.contiguous().T,
        "every_other_row": wide[::2, :128],
        "column_slice": wide[:40, 37:165],
    }[layout]
    assert not embeddings.is_contiguous()
    assert_distances(embeddings, backend)


def test_zero_rows_are_at_distance_one(backend: str) -> None:
    embeddings = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]])
    expected = torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 2], [1, 1, 0, 1], [1, 2, 1, 0]])
    torch.testing.assert_close(pairwise_cosine(embeddings, backend=backend), expected, atol=TOLERANCE, rtol=0)


def test_scale_does_not_matter(backend: str, generator: torch.Generator) -> None:
    embeddings = torch.randn(5, 64, generator=generator)
    scaled = embeddings * torch.tensor([1e-3, 1.0, 10.0, 1e3, 7.0])[:, None]
    expected = pairwise_cosine(embeddings, backend=backend)
    torch.testing.assert_close(pairwise_cosine(scaled, backend=backend), expected, atol=TOLERANCE, rtol=0)


def test_no_rows(backend: str) -> None:
    assert pairwise_cosine(torch.ones(0, 64), backend=backend).shape == (0, 0)


@needs_interpreter
@pytest.mark.parametrize("num_rows", [10, BLOCK_N + 1, 3 * BLOCK_N])
def test_only_the_upper_triangle_is_read(count_bytes: Counting, num_rows: int) -> None:
    with count_bytes() as counted:
        pairwise_cosine(torch.ones(num_rows, 40, dtype=torch.float16), backend="triton")
    traffic = pairwise_cosine_traffic(num_rows=num_rows, hidden_size=40, dtype=torch.float16)
    assert counted.total == traffic.requested_bytes


@pytest.mark.parametrize("chosen", [None, "reference", pytest.param("triton", marks=needs_interpreter)])
def test_which_implementation_runs(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(module, "pairwise_cosine_reference", lambda *_: ran.append("reference"))
    monkeypatch.setattr(module, "_launch", lambda *_: ran.append("triton"))
    pairwise_cosine(torch.ones(2, 64), backend=chosen)
    assert ran == [chosen or "reference"]


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.ones(64), "embeddings must be a 2-D"),
        (torch.ones(2, 64, dtype=torch.float64), "float32, float16 or bfloat16"),
        (torch.ones(2, 0), "1 to 16384 columns, got 0"),
        (torch.ones(MAX_EMBEDDINGS + 1, 4), r"at most 1024 rows \(the largest search width\), got 1025"),
    ],
)
def test_errors(embeddings: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairwise_cosine(embeddings)
