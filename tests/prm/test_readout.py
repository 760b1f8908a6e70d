"""Readouts: a batch is read in one call, with the results of reading each step by itself; NaN is never hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang_ets.kernels.step_pool import step_pool_reference
from sglang_ets.kernels.step_score import step_score_reference

from sglang_ets.prm import readout as module
from sglang_ets.prm.formats import Head, Readout, StepProbability, TokenRows
from sglang_ets.prm.readout import StepStates, read_steps
from sglang_ets.prm.vocabulary import Vocabulary

WIDTH, WORDS = 32, 50
LENGTHS = (1, 7, 300, 2)  # one longer than a chunk


def model() -> Any:
    torch.manual_seed(0)
    two_layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 2))
    two_layers.requires_grad_(False)
    padded = torch.cat([torch.randn(WORDS, WIDTH), torch.zeros(14, WIDTH)])
    head = SimpleNamespace(weight=padded)
    return SimpleNamespace(score=two_layers, lm_head=head, config=SimpleNamespace(vocab_size=WORDS))


def states(length: int, first: int = 0, parent_score: float | None = None) -> StepStates:
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(length + 1, WIDTH, generator=generator) / 4
    token_ids = tuple(torch.randint(WORDS, (length,), generator=generator).tolist())
    return StepStates(hidden[:-1], hidden[1:], slice(0, length), token_ids, first, parent_score)


def expected(spec: Readout, one: StepStates, own: Any) -> float:
    """The definition, for one step in float64."""
    hidden = one.hidden.double()
    if isinstance(spec, Head):
        logits = own.score.double()(hidden[-1])
        return float(logits.softmax(-1)[spec.label] if spec.activation == "softmax" else logits[spec.label].sigmoid())
    weight = own.lm_head.weight[:WORDS].double()
    if isinstance(spec, TokenRows):
        logits = weight[list(spec.token_ids)] @ hidden[-1]
        return float(logits.softmax(-1)[0] if len(spec.token_ids) > 1 else logits[0].sigmoid())
    taken = (one.before.double() @ weight.T).log_softmax(-1)[range(len(one.token_ids)), list(one.token_ids)][
        one.first :
    ]
    if spec.reduce == "mean":
        return float(taken.mean().exp())
    return min(float(taken.sum().exp()), 1.0 if one.parent_score is None else one.parent_score)


SPECS = (Head(), Head("sigmoid", 0), TokenRows((3, 8)), TokenRows((3,)), StepProbability("mean"), StepProbability())


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_batch_is_read_as_each_step_alone(spec: Readout) -> None:
    own = model()
    steps = [states(length, first=length // 3, parent_score=1e-3) for length in LENGTHS]
    together, embeddings = read_steps(spec, own, steps)
    for one, score, embedding in zip(steps, together, embeddings, strict=True):
        (alone,), (alone_embedding,) = read_steps(spec, own, [one])
        assert score == pytest.approx(alone, rel=1e-5, abs=0)
        np.testing.assert_allclose(embedding, alone_embedding, atol=1e-6)
        mean = one.hidden.double().mean(0)
        np.testing.assert_allclose(embedding, mean / mean.norm(), atol=1e-6)
    exact = model()
    for one, score in zip(steps, together, strict=True):
        assert score == pytest.approx(expected(spec, one, exact), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("spec", [Head(), TokenRows((3, 8))], ids=repr)
def test_the_head_is_read_in_one_call(spec: Readout, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = module.step_score

    def counted(hidden: torch.Tensor, positions: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(positions))
        return original(hidden, positions, *args, **kwargs)

    monkeypatch.setattr(module, "step_score", counted)
    read_steps(spec, model(), [states(length) for length in LENGTHS])
    assert calls == [len(LENGTHS)]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_batch_synchronises_once(spec: Readout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the refused calls would wait for a GPU. The kernels check arguments on a CPU only, so they stand aside."""
    copies: list[Sequence[int]] = []
    to_host = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor.shape)
        return to_host(tensor)

    def refused(tensor: torch.Tensor, *_args: Any) -> Any:
        raise AssertionError(f"a synchronisation for a tensor of shape {tuple(tensor.shape)}")

    steps = [states(length) for length in LENGTHS]
    own = model()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", counted)
        patch.setattr(module, "step_pool", lambda hidden, offsets: step_pool_reference(hidden, offsets))
        patch.setattr(module, "step_score", lambda *args, **kwargs: step_score_reference(*args, *kwargs.values()))
        for name in ("item", "tolist", "__float__", "__bool__"):
            patch.setattr(torch.Tensor, name, refused)
        read_steps(spec, own, steps)
    assert copies == [(len(LENGTHS), 1 + WIDTH)]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_no_numbers_give_nan_for_their_step_alone(spec: Readout, value: float) -> None:
    steps = [states(length, parent_score=0.5) for length in (3, 4, 5)]
    steps[1].hidden[-1, 2] = value
    scores, _ = read_steps(spec, model(), steps)
    assert [math.isnan(score) for score in scores] == [False, True, False]


def test_rows_that_two_ranks_have_halves_of_are_whole() -> None:
    whole = torch.randn(WORDS + 14, WIDTH)
    halves = whole.split(len(whole) // 2)
    asked = (3, WORDS - 1)
    parts = [
        SimpleNamespace(
            weight=half,
            shard_indices=SimpleNamespace(
                org_vocab_start_index=at * len(half), org_vocab_end_index=(at + 1) * len(half)
            ),
        )
        for at, half in enumerate(halves)
    ]
    hidden = torch.randn(5, WIDTH)
    own = [Vocabulary(part, WORDS, SimpleNamespace(all_reduce=lambda rows: rows)).rows(asked) for part in parts]
    assert torch.equal(own[0] + own[1], whole[list(asked)])
    other = SimpleNamespace(all_gather=lambda logits, dim: torch.cat([logits, hidden @ halves[1].T], dim=dim))
    torch.testing.assert_close(Vocabulary(parts[0], WORDS, other).logits(hidden), (hidden @ whole.T)[:, :WORDS])
