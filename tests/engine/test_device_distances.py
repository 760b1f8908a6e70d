"""Distances where the models run: the same as those of numpy, zero vectors included."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sglang_ets.core.clusters import cluster_labels, cosine_distances
from sglang_ets.engine import device_distances
from sglang_ets.engine.device_distances import DeviceDistances, step_distances

CPU = torch.device("cpu")


def embeddings(num_rows: int, at_zero: tuple[int, ...] = ()) -> NDArray[np.float32]:
    made = np.random.default_rng(0).standard_normal((num_rows, 96)).astype(np.float32)
    made[list(at_zero)] = 0.0
    return made


@pytest.mark.parametrize(
    ("num_rows", "at_zero"), [(1, ()), (2, ()), (70, ()), (70, (0, 3, 69)), (2, (0, 1)), (3, (1,))]
)
def test_equal_those_of_numpy(num_rows: int, at_zero: tuple[int, ...]) -> None:
    given = embeddings(num_rows, at_zero)
    distances = DeviceDistances(CPU)(given)
    assert distances.dtype == np.float64
    np.testing.assert_allclose(distances, cosine_distances(given), atol=1e-6)
    assert np.array_equal(distances, distances.T)
    assert not np.diagonal(distances).any()


def test_cluster_labels_take_them() -> None:
    given = np.repeat(embeddings(4), 3, axis=0) + 0.01 * embeddings(12)
    assert cluster_labels(given, 0.3, DeviceDistances(CPU)).tolist() == np.repeat(np.arange(4), 3).tolist()


def test_a_server_on_the_cpu_stays_with_numpy() -> None:
    assert step_distances("cpu") is cosine_distances


def test_a_server_on_cuda_takes_the_kernel_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(device_distances.torch.cuda, "Stream", made.append)
    assert isinstance(step_distances("cuda:0"), DeviceDistances)
    assert made == [torch.device("cuda", 0)]
