"""step_score: each implementation against float64 logits, odd shapes, errors, and which implementation ran."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from sglang_ets.kernels import step_score
from sglang_ets.kernels.dispatch import INTERPRETED
from sglang_ets.kernels.traffic import step_score_traffic

from tests.kernels.conftest import with_dtypes

Counting = Callable[[], AbstractContextManager]  # the fixture of conftest.py
module = importlib.import_module("sglang_ets.kernels.step_score")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreter.py, under TRITON_INTERPRET=1")
TOLERANCE = 2e-5  # float32 sums of up to 8192 products
POSITIONS = (0, 3, 3, 10)


def oracle(
    hidden: torch.Tensor, positions: torch.Tensor, head_rows: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    logits = hidden.double()[positions] @ head_rows.double().T + (0.0 if bias is None else bias.double())
    if activation == "softmax":
        return logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    return 1 / (1 + (-logits).exp()) if activation == "sigmoid" else logits


def assert_scored(
    hidden: torch.Tensor, head_rows: torch.Tensor, bias: torch.Tensor | None, activation: str, backend: str
) -> None:
    positions = torch.tensor(POSITIONS)
    expected = oracle(hidden, positions, head_rows, bias, activation)
    for index in range(len(head_rows)):
        result = step_score(hidden, positions, head_rows, bias, activation=activation, index=index, backend=backend)
        assert result.dtype == torch.float32 and result.shape == (len(POSITIONS),)
        torch.testing.assert_close(result.double(), expected[:, index], atol=TOLERANCE, rtol=TOLERANCE)


def random_head(num_rows: int, hidden_size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(num_rows, hidden_size, generator=generator) / hidden_size**0.5


@pytest.mark.parametrize(("hidden_size", "dtype"), with_dtypes(1, 128, 256, 1000, 4096, 8192))
def test_sizes(backend: str, dtype: torch.dtype, hidden_size: int, generator: torch.Generator) -> None:
    hidden = torch.randn(11, hidden_size, generator=generator).to(dtype)
    assert_scored(hidden, random_head(2, hidden_size, generator).to(dtype), None, "softmax", backend)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "num_rows"),
    [("softmax", 2), ("softmax", 3), *[(a, r) for a in ("sigmoid", "none") for r in (1, 2, 3)]],
)
def test_options(backend: str, activation: str, num_rows: int, with_bias: bool, generator: torch.Generator) -> None:
    hidden = torch.randn(11, 300, generator=generator)
    bias = torch.randn(num_rows, generator=generator) if with_bias else None
    assert_scored(hidden, random_head(num_rows, 300, generator), bias, activation, backend)


def test_mixed_dtypes(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    hidden = torch.randn(11, 300, generator=generator).to(torch.bfloat16)
    assert_scored(hidden, random_head(3, 300, generator).to(dtype), torch.ones(3, dtype=dtype), "softmax", backend)


def test_non_contiguous(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    hidden = torch.randn(300, 22, generator=generator).to(dtype).T[::2]
    head_rows = random_head(6, 300, generator).to(dtype)[::2]
    bias = torch.randn(6, generator=generator).to(dtype)[::2]
    assert not (hidden.is_contiguous() or head_rows.is_contiguous() or bias.is_contiguous())
    for activation in ("softmax", "sigmoid"):
        assert_scored(hidden, head_rows, bias, activation, backend)


def test_strided_positions(backend: str, generator: torch.Generator) -> None:
    hidden, head_rows = torch.randn(11, 64, generator=generator), random_head(2, 64, generator)
    positions = torch.tensor([[value, -1] for value in POSITIONS])[:, 0]
    expected = step_score(hidden, positions.contiguous(), head_rows, backend="reference")
    torch.testing.assert_close(step_score(hidden, positions, head_rows, backend=backend), expected)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_large_logits_saturate(backend: str, activation: str, logit: float) -> None:
    head_rows = torch.tensor([[logit], [0.0]])
    result = step_score(torch.ones(1, 1), torch.tensor([0]), head_rows, activation=activation, backend=backend)
    assert result.item() == pytest.approx(float(logit > 0), abs=1e-6)


@pytest.mark.parametrize("num_rows", [0, 4])
def test_no_positions(backend: str, num_rows: int) -> None:
    positions = torch.tensor([], dtype=torch.int64)
    assert step_score(torch.ones(num_rows, 64), positions, torch.ones(2, 64), backend=backend).shape == (0,)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_rival_rows_are_not_read(backend: str, activation: str) -> None:
    head_rows = torch.full((3, 64), float("nan"))
    head_rows[1] = 0.0
    result = step_score(
        torch.ones(2, 64), torch.tensor([1]), head_rows, activation=activation, index=1, backend=backend
    )
    assert result.item() == (0.5 if activation == "sigmoid" else 0.0)


@needs_interpreter
@pytest.mark.parametrize("position", [-1, 4])
def test_unchecked_bad_position_gives_nan(position: int) -> None:
    positions = torch.tensor([position, 2])
    result = module._launch(torch.ones(4, 64), positions, torch.ones(2, 64), None, "softmax", 0)
    assert result.isnan().tolist() == [True, False]


@needs_interpreter
def test_bytes_moved(count_bytes: Counting) -> None:
    hidden = torch.ones(11, 5000, dtype=torch.float16)
    with count_bytes() as counted:
        step_score(hidden, torch.tensor(POSITIONS), hidden[:3], hidden[0, :3], backend="triton")
    traffic = step_score_traffic(num_positions=4, hidden_size=5000, num_head_rows=3, dtype=torch.float16, has_bias=True)
    assert counted.total == traffic.requested_bytes


@pytest.mark.parametrize("chosen", [None, "reference", pytest.param("triton", marks=needs_interpreter)])
def test_which_implementation_runs(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(module, "step_score_reference", lambda *_: ran.append("reference"))
    monkeypatch.setattr(module, "_launch", lambda *_: ran.append("triton"))
    step_score(torch.ones(2, 64), torch.tensor([0]), torch.ones(2, 64), backend=chosen)
    assert ran == [chosen or "reference"]


VALID = {
    "hidden": torch.ones(4, 8),
    "positions": torch.tensor([0, 3]),
    "head_rows": torch.ones(2, 8),
    "bias": None,
    "activation": "softmax",
    "index": 0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(8)}, "hidden must be a 2-D"),
        ({"hidden": torch.ones(4, 8, dtype=torch.float64)}, "hidden must be a 2-D float32"),
        ({"positions": torch.tensor([0], dtype=torch.int32)}, "positions must be a 1-D int64"),
        ({"positions": torch.tensor([[0]])}, "positions must be a 1-D int64"),
        ({"positions": torch.tensor([0], device="meta")}, "positions must be on the CPU or on cpu"),
        ({"positions": torch.tensor([0, 4, -1])}, r"rows of hidden \(0\.\.3\), got \[4, -1\]"),
        ({"head_rows": torch.ones(8)}, "head_rows must be a 2-D"),
        ({"head_rows": torch.ones(2, 7)}, "hidden's 8 columns"),
        ({"head_rows": torch.ones(2, 8, device="meta")}, "got 8 on meta"),
        ({"head_rows": torch.ones(4, 8)}, "1 to 3 rows, got 4"),
        ({"head_rows": torch.ones(0, 8)}, "1 to 3 rows, got 0"),
        ({"head_rows": torch.ones(1, 8)}, "softmax over 1 head row is always 1"),
        ({"activation": "tanh"}, "one of softmax, sigmoid, none, got 'tanh'"),
        ({"index": 2}, r"\(0\.\.1\), got 2"),
        ({"index": -1}, r"\(0\.\.1\), got -1"),
        ({"bias": torch.ones(3)}, "bias must be a float vector of 2"),
        ({"backend": "cuda"}, "backend must be one of 'triton', 'reference' or None, got 'cuda'"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = VALID | change
    with pytest.raises(ValueError, match=message):
        step_score(arguments.pop("hidden"), arguments.pop("positions"), arguments.pop("head_rows"), **arguments)
