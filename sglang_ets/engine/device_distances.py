"""Distances of a level's embeddings where the models run: numpy beside a CPU engine, the Triton kernel on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_ets.core.clusters import Distances, cosine_distances, zeros_together
from sglang_ets.kernels import choose_backend, pairwise_cosine

WARM_UP_COLUMNS = (
    64  # the kernel is compiled once for all sizes that are multiples of 16, as those of hidden states are
)


def step_distances(device: torch.device | str) -> Distances:
    """What the searches of a server on `device` cluster by."""
    device = torch.device(device)
    return cosine_distances if choose_backend(device) == "reference" else DeviceDistances(device)


def warm_up(distances: Distances) -> None:
    """Compile what is compiled at its first use, so that the first search need not wait for it."""
    distances(np.ones((2, WARM_UP_COLUMNS), dtype=np.float32))


class DeviceDistances:
    """`cosine_distances` by `pairwise_cosine`, in float32.

    Selections run beside the decoding batch, so the kernel gets a stream of its own: on the engine's it would wait for that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """float32[L, H], L <= 1024 -> float64[L, L]; waits for its own stream only."""
        beside: AbstractContextManager[object] = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        with beside:
            distances = pairwise_cosine(torch.from_numpy(embeddings).to(self._device)).cpu()
        return zeros_together(distances.numpy().astype(np.float64), np.linalg.norm(embeddings, axis=1))
