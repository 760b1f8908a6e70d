"""Draws by seed on the CPU: the right distribution, and nothing but seed and position decides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from sglang.srt.layers import sampler
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from sglang_ets.patches import cpu_sampler
from sglang_ets.patches.cpu_sampler import (
    NO_SEED,
    draw_by_seed,
    drawable,
    draws_further,
    row_seeds,
    sample_rows,
    uniform,
)

from sglang_ets.engine.children import ChildReq
from sglang_ets.engine.strands import FURTHER_KEY


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


@pytest.mark.parametrize("vocab", [7, cpu_sampler.BLOCK, 5 * cpu_sampler.BLOCK, 1000])
def test_sums_of_blocks_draw_what_the_sums_of_all_columns_draw(vocab: int) -> None:
    """Weights are small whole numbers, so that every sum is exact; most of them, and whole blocks, are zero."""
    draw = torch.Generator().manual_seed(vocab)
    weights = torch.randint(0, 5, (30, vocab), generator=draw).float() * (torch.rand(30, vocab, generator=draw) < 0.05)
    weights[:, 3] = torch.arange(30) % 2
    weights[:, -1] = 1 - weights[:, 3]  # so that no row is empty, and some end in a weight, some in zeros
    sums, positions, seen = weights.double().cumsum(1), torch.arange(30), set()
    for seeds in torch.arange(30 * 50).view(25, 30, 2):
        drawn = torch.from_numpy(cpu_sampler.uniform(seeds.numpy(), positions.numpy()[:, None])) * sums[:, -1:]
        expected = torch.searchsorted(sums, drawn, right=True)
        assert torch.equal(cpu_sampler._columns(weights, seeds, positions), expected)
        assert (weights.gather(1, expected) > 0).all()
        seen |= set(expected.unique().tolist())
    assert len(seen) > 1


def test_only_children_of_a_search_have_a_seed() -> None:
    child = ChildReq.__new__(ChildReq)
    child.sampling_params = SimpleNamespace(sampling_seed=5)
    other = SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=5))
    assert row_seeds([child, other, other]) == [5, NO_SEED, NO_SEED]


@dataclass
class Info:
    """What `SamplingBatchInfo` has for these rows: seeds, and one setting of each kind for all of them."""

    sampling_seed: torch.Tensor | None
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    need_min_p_sampling: bool = True


def info_of(seeds: torch.Tensor, top_k: int = TOP_K_ALL, top_p: float = 1.0, min_p: float = 0.0) -> Info:
    rows = (len(seeds),)
    return Info(seeds, torch.full(rows, top_k), torch.full(rows, top_p), torch.full(rows, min_p))


PROBABILITIES = torch.tensor([0.02, 0.4, 0.3, 0.08, 0.15, 0.05])


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 0.25}, [1, 2, 4]),
        ({"top_k": 4}, [1, 2, 3, 4]),
        ({"top_k": 4, "min_p": 0.25}, [1, 2, 4]),
        ({"top_p": 0.6, "min_p": 0.1}, [1, 2]),
        ({"top_p": 0.86, "top_k": 5, "min_p": 0.15}, [1, 2, 3, 4]),
    ],
)
def test_rows_of_searches_follow_the_cut_distribution(
    cut: dict[str, Any], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "multinomial_with_seed", partial(draw_by_seed, None))
    num_rows = 20_000
    probs = PROBABILITIES.repeat(num_rows, 1)
    drawn, _ = sample_rows(
        _not_called, None, probs, info_of(torch.arange(num_rows), **cut), torch.full((num_rows,), 3), False
    )
    counts = torch.bincount(drawn, minlength=6)
    assert counts[kept].sum() == num_rows
    expected = PROBABILITIES[kept].double() / PROBABILITIES[kept].double().sum() * num_rows
    assert chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-3
    assert torch.equal(probs, PROBABILITIES.repeat(num_rows, 1)), "log-probabilities are read from them afterwards"


NAN = float("nan")


@pytest.mark.parametrize(
    "broken", [[NAN] * 6, [0.5, NAN, 0.5, 0, 0, 0], [0.0] * 6, [float("inf"), 0, 0, 0, 0, 0]], ids=str
)
@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {}], ids=str)
def test_a_row_that_is_no_distribution_harms_no_other(broken: list[float], cut: dict[str, Any]) -> None:
    """A grammar that no token fits leaves one; sglang's own draw raises on it, and that ends the scheduler."""

    def stock(_sampler: Any, probs: torch.Tensor, info: Any, positions: torch.Tensor, is_simple: bool) -> Any:
        if is_simple:
            return sampler.sampling_from_probs_torch(probs, None, positions), None
        cuts = (info.top_ks, info.top_ps, info.min_ps, True)
        return sampler.top_k_top_p_min_p_sampling_from_probs_torch(probs.clone(), *cuts, None, positions), None

    probs = torch.stack([PROBABILITIES, torch.tensor(broken), torch.tensor([0.0, 0, 0, 0, 0, 1])])
    before = probs.clone()
    info = info_of(torch.full((3,), NO_SEED), **cut)
    drawn, _ = sample_rows(stock, None, probs, info, torch.arange(3), not cut)
    assert drawn[1:].tolist() == [0, 5]
    assert torch.equal(probs.nan_to_num(-1.0), before.nan_to_num(-1.0)), (
        "log-probabilities are read from them afterwards"
    )
    sound = PROBABILITIES.repeat(2, 1)
    assert drawable(sound) is sound


@pytest.mark.parametrize(
    "cut", [{}, {"min_p": 0.25}, {"top_k": 4}, {"top_p": 0.6, "min_p": 0.1}, {"top_p": 0.86, "top_k": 5}], ids=str
)
def test_further_seeds_of_a_row_draw_as_if_each_had_a_row_of_its_own(
    cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "multinomial_with_seed", partial(draw_by_seed, None))
    num_rows, num_seeds = 40, 5
    probs = torch.rand(num_rows, 50, generator=torch.manual_seed(1)).softmax(dim=1)
    seeds, positions = torch.arange(num_rows * num_seeds).view(num_rows, num_seeds) * 7, torch.arange(num_rows)
    seeds[::4, 0] = NO_SEED
    together = info_of(seeds, **cut)
    drawn, capture = sample_rows(_nines, None, probs.clone(), together, positions, not cut)
    for column in range(num_seeds):
        alone, _ = sample_rows(_nines, None, probs.clone(), info_of(seeds[:, column], **cut), positions, not cut)
        tokens = drawn if column == 0 else getattr(together, FURTHER_KEY)[:, column - 1]
        is_drawn = seeds[:, 0] != NO_SEED if column else torch.ones(num_rows, dtype=torch.bool)
        assert torch.equal(tokens[is_drawn], alone[is_drawn])
    assert (drawn[::4].tolist(), capture) == ([9] * 10, "captured")
    assert len(set(getattr(together, FURTHER_KEY).flatten().tolist())) > 2


@pytest.mark.parametrize("vocab", [7, 300, 3000])
def test_a_cut_row_is_drawn_as_sglang_cuts_it(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the other rows ask for; the flat rows need more tokens for their top-p than are sorted at first."""
    monkeypatch.setattr(sampler, "multinomial_with_seed", partial(draw_by_seed, None))
    generator = torch.manual_seed(2)
    probs = torch.cat([torch.randn(60, vocab, generator=generator) * scale for scale in (4.0, 0.1)]).softmax(dim=1)
    num_rows = len(probs)
    info = info_of(torch.arange(num_rows) * 3)
    info.top_ks = torch.tensor([1, 5, 40, 2000, TOP_K_ALL]).repeat(num_rows)[:num_rows]
    info.top_ps = torch.tensor([0.1, 0.5, 0.9, 0.999, 1.0, 1.0, 0.7]).repeat(num_rows)[:num_rows]
    drawn, _ = sample_rows(_not_called, None, probs, info, torch.arange(num_rows), False)
    zeros = torch.zeros(num_rows)
    seeds = (info.sampling_seed, torch.arange(num_rows))
    expected = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        probs.clone(), info.top_ks, info.top_ps, zeros, False, *seeds
    )
    is_cut = (info.top_ks != TOP_K_ALL) | (
        info.top_ps != 1
    )  # sglang draws what is not cut in the order of the vocabulary
    assert torch.equal(drawn[is_cut], expected[is_cut])


def _nines(_sampler: Any, probs: torch.Tensor, *_: Any) -> Any:
    return torch.full((len(probs),), 9, dtype=torch.int32), "captured"


def test_seeds_are_drawn_at_once_only_where_the_sampler_comes_to_it() -> None:
    logits = torch.zeros(1, 6)
    assert draws_further(logits, SimpleNamespace(sampling_seed=torch.tensor([3]), is_all_greedy=False))
    assert not draws_further(logits, SimpleNamespace(sampling_seed=torch.tensor([3]), is_all_greedy=True))
    assert not draws_further(logits, SimpleNamespace(sampling_seed=None, is_all_greedy=False))
    assert not draws_further(logits.to("meta"), SimpleNamespace(sampling_seed=torch.tensor([3]), is_all_greedy=False))


def _not_called(*_args: Any) -> Any:
    raise AssertionError("a batch of searches alone needs no draws of sglang")


def test_rows_without_a_seed_are_drawn_by_sglang_which_sees_no_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "multinomial_with_seed", partial(draw_by_seed, None))
    seen: list[Any] = []

    def stock(_sampler: Any, probs: torch.Tensor, info: Any, _positions: torch.Tensor, is_simple: bool) -> Any:
        seen.append((info.sampling_seed, is_simple))
        return torch.full((len(probs),), 9, dtype=torch.int32), "captured"

    probs = PROBABILITIES.repeat(4, 1)
    positions = torch.arange(4)
    mixed = info_of(torch.tensor([NO_SEED, 5, NO_SEED, 6]), min_p=0.25)
    drawn, capture = sample_rows(stock, None, probs, mixed, positions, False)
    assert (drawn[[0, 2]].tolist(), capture) == ([9, 9], "captured")
    alone, _ = sample_rows(
        _not_called, None, probs[[1, 3]], info_of(torch.tensor([5, 6]), min_p=0.25), positions[[1, 3]], False
    )
    assert torch.equal(drawn[[1, 3]], alone)
    ordinary, _ = sample_rows(stock, None, probs, info_of(torch.full((4,), NO_SEED)), positions, True)
    assert ordinary.tolist() == [9] * 4
    assert seen == [(None, False), (None, True)]
