"""On a real GPU: the compiled Triton kernels against the references on the same device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sglang_ets.kernels import choose_backend, describe_backend, pairwise_cosine, step_pool, step_score

from sglang_ets.core.clusters import cosine_distances
from sglang_ets.engine.device_distances import step_distances

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device (test_interpreter.py and test_aot.py run without one)", allow_module_level=True)

POOL_TOLERANCE, SCORE_TOLERANCE, DISTANCE_TOLERANCE = 1e-6, 2e-5, 5e-6
Random = Callable[..., torch.Tensor]
HIDDEN_SIZES = [1, 128, 896, 1000, 3584, 4096, 8192]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def random(device: torch.device) -> Random:
    generator = torch.Generator(device=device).manual_seed(20250)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def test_triton_is_chosen(device: torch.device) -> None:
    assert choose_backend(device) == "triton"
    assert "Triton" in describe_backend(device) and torch.cuda.get_device_name(device) in describe_backend(device)


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("offsets_on_device", [False, True])
def test_step_pool(
    random: Random, device: torch.device, dtype: torch.dtype, hidden_size: int, offsets_on_device: bool
) -> None:
    hidden = (random(300, hidden_size) + 0.5).to(dtype)
    offsets = torch.tensor([0, 1, 1, 9, 200, 300])
    offsets = offsets.to(device) if offsets_on_device else offsets
    expected = step_pool(hidden, offsets, backend="reference")
    torch.testing.assert_close(step_pool(hidden, offsets), expected, atol=POOL_TOLERANCE, rtol=0)


def test_step_pool_bad_offsets_on_the_device_give_nan(device: torch.device) -> None:
    result = step_pool(torch.ones(6, 64, device=device), torch.tensor([0, 3, 9], device=device))
    assert result.isnan().any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_step_score(random: Random, dtype: torch.dtype, hidden_size: int, activation: str) -> None:
    hidden, head_rows = random(50, hidden_size).to(dtype), (random(3, hidden_size) / hidden_size**0.5).to(dtype)
    positions = torch.tensor([0, 7, 7, 49])
    for bias in (None, random(3)):
        results = [
            step_score(hidden, positions, head_rows, bias, activation=activation, index=1, backend=backend)
            for backend in ("triton", "reference")
        ]
        torch.testing.assert_close(*results, atol=SCORE_TOLERANCE, rtol=SCORE_TOLERANCE)


def test_step_score_bad_position_on_the_device_gives_nan(device: torch.device) -> None:
    positions = torch.tensor([1, 6], device=device)
    result = step_score(torch.ones(6, 64, device=device), positions, torch.ones(2, 64, device=device))
    assert result.isnan().tolist() == [False, True]


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("num_rows", [1, 64, 200, 1024])
def test_pairwise_cosine(random: Random, dtype: torch.dtype, hidden_size: int, num_rows: int) -> None:
    embeddings = (random(num_rows, hidden_size) + 0.3).to(dtype)
    rows = embeddings.double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    expected = (1 - unit @ unit.T).fill_diagonal_(0.0)
    result = pairwise_cosine(embeddings)
    torch.testing.assert_close(result.double(), expected, atol=DISTANCE_TOLERANCE, rtol=0)
    assert torch.equal(result, result.T)


@pytest.mark.parametrize("num_rows", [2, 64, 300])
def test_distances_of_a_level_equal_those_of_numpy(random: Random, device: torch.device, num_rows: int) -> None:
    embeddings = random(num_rows, 896).cpu().numpy()
    embeddings[::7] = 0.0
    found = step_distances(device)(embeddings)
    np.testing.assert_allclose(found, cosine_distances(embeddings), atol=DISTANCE_TOLERANCE)


def test_non_contiguous(random: Random, dtype: torch.dtype) -> None:
    hidden = random(256, 600).to(dtype).T[::2]
    assert not hidden.is_contiguous()
    offsets = torch.tensor([0, 300])
    pooled = step_pool(hidden, offsets)
    torch.testing.assert_close(pooled, step_pool(hidden, offsets, backend="reference"), atol=POOL_TOLERANCE, rtol=0)
    distances = pairwise_cosine(hidden)
    expected = pairwise_cosine(hidden, backend="reference")
    torch.testing.assert_close(distances, expected, atol=1e-4, rtol=0)  # the reference's own matmul may use TF32
