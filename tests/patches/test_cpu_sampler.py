"""Draws by seed on the CPU: the right distribution, and nothing but seed and position decides."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import chisquare, kstest
from sglang_ets.patches.cpu_sampler import draw_by_seed, row_seeds, uniform

from sglang_ets.engine.children import ChildReq


def draw(probabilities: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return draw_by_seed(lambda *_: None, probabilities.log(), seeds, positions)


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    many, one = np.arange(20_000), np.full(20_000, 7)
    for numbers in (uniform(many, one), uniform(one, many)):
        assert 0 <= numbers.min() <= numbers.max() < 1
        assert kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_tokens_follow_the_distribution_and_none_of_weight_zero_is_drawn() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.15, 0.05, 0.0])
    rows = 20_000
    drawn = draw(probabilities.repeat(rows, 1), torch.arange(rows), torch.full((rows,), 11))
    assert drawn.shape == (rows, 1)
    counts = torch.bincount(drawn[:, 0], minlength=7).numpy()
    kept = probabilities.numpy() > 0
    assert counts[~kept].sum() == 0
    assert chisquare(counts[kept], probabilities.numpy()[kept] * rows, sum_check=False).pvalue > 1e-3


def test_a_row_is_drawn_alike_alone_and_among_others() -> None:
    probabilities = torch.rand(64, 50)
    seeds, positions = torch.arange(64) * 5, torch.arange(64) % 7
    together = draw(probabilities, seeds, positions)
    for row in range(64):
        assert draw(probabilities[row : row + 1], seeds[row : row + 1], positions[row : row + 1])[0] == together[row]


def test_only_children_of_a_search_have_the_seed_that_they_carry() -> None:
    child = ChildReq.__new__(ChildReq)
    child.sampling_params = SimpleNamespace(sampling_seed=5)
    other = SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=5))
    seeds = row_seeds([child, other, other])
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
