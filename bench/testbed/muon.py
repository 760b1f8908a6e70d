"""Muon (Jordan et al. 2024): momentum whose every matrix is replaced by the nearest orthogonal one.

torch.optim.Muon does the same in bfloat16, which is slow on a CPU without instructions for it,
and one matrix at a time. Here equal shapes are orthogonalised together, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

# Coefficients of the quintic Newton-Schulz iteration, as published.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5
_LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """For matrices only. The update of an [m, n] matrix has the size of sqrt(max(1, m / n))."""

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of all matrices that have a gradient, in place."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                directions = orthogonal(torch.stack([self._direction(one, group["momentum"]) for one in matrices]))
                size = max(1.0, shape[0] / shape[1]) ** 0.5
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.add_(direction, alpha=-group["lr"] * size)

    def _direction(self, matrix: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """The gradient with Nesterov momentum."""
        state = self.state[matrix]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(matrix)
        state["mean"].lerp_(matrix.grad, 1 - momentum)
        return torch.lerp(matrix.grad, state["mean"], momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """float32[K, m, n], each with all singular values near 1, from float32[K, m, n]."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(_LEAST_NORM)
    for _ in range(_NUM_ITERATIONS):
        gram = wide @ wide.mT
        wide = _A * wide + (_B * gram + _C * gram @ gram) @ wide
    return wide.mT if is_tall else wide
