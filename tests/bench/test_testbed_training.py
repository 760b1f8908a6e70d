"""Training of the testbed: batches, the optimiser, and a run that goes on from its checkpoint as if never interrupted."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.testbed import train as training
from bench.testbed.muon import Muon, orthogonal
from bench.testbed.tokenizer import EOS_ID, PAD_ID
from bench.testbed.train import IGNORED, Recipe, Stage, Trainee, batch, new_network

TINY = Recipe(
    short=Stage(3, 3, 600, 300), long=Stage(3, 5, 1_200, 800), tokens_per_update=200, probe_every_tokens=300,
)  # fmt: skip


def test_a_batch_depends_on_seed_stage_and_index_only() -> None:
    ids, labels, num_tokens = batch(TINY, TINY.long, 3)
    again = batch(TINY, TINY.long, 3)
    assert torch.equal(ids, again[0]) and torch.equal(labels, again[1])
    for other in (batch(TINY, TINY.long, 4), batch(TINY, TINY.short, 3), batch(replace(TINY, seed=1), TINY.long, 3)):
        assert other[0].shape != ids.shape or not torch.equal(other[0], ids)
    assert num_tokens == int((ids != PAD_ID).sum()) >= TINY.tokens_per_update


def test_labels_are_the_solutions_tokens_and_their_end() -> None:
    ids, labels, _ = batch(TINY, TINY.long, 0)
    for row, wanted in zip(ids, labels, strict=True):
        first = int((wanted != IGNORED).nonzero()[0])
        last = int((row == EOS_ID).nonzero()[0])
        assert row[first - 1] == training.VOCABULARY["\n"]  # the prompt ends in a newline
        assert torch.equal(wanted[first : last + 1], row[first : last + 1])
        assert (wanted[:first] == IGNORED).all() and (wanted[last + 1 :] == IGNORED).all()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonal_brings_all_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert (values > 0.6).all() and (values < 1.3).all()


def test_muon_agrees_with_torchs_but_for_its_precision() -> None:
    start = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        Muon([ours], lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95, nesterov=True),
    )
    for step in range(3):
        gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.03)


def small_network(seed: int) -> LlamaForCausalLM:
    """`new_network`, so small that an update takes a millisecond."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config = LlamaConfig(**{**new_network(0).config.to_dict(), **sizes})
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Accuracies that the probes will find, in order; then always the last."""
    accuracies = [0.1, 0.9, 0.95]
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_UPDATES", 2)
    monkeypatch.setattr(training, "NUM_PROBED", 2)
    monkeypatch.setattr(training, "new_network", small_network)
    monkeypatch.setattr(
        training, "greedy_accuracy", lambda _n, _p: accuracies.pop(0) if len(accuracies) > 1 else accuracies[0]
    )
    return accuracies


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_the_first_good_probe_is_the_policy_model_and_the_end_is_the_prm(
    tmp_path: Path, probed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped: list[str] = []
    ship = training.ship
    monkeypatch.setattr(training, "ship", lambda net, folder: (shipped.append(folder.name), ship(net, folder)))
    training.Run(TINY, tmp_path, tmp_path / "kept.pt").to_end(short_model=None)
    assert shipped == ["policy", "prm", "policy", "prm", "prm"], "two probes ship both, the end the PRM"
    assert probed == [0.95]
    assert not equal(weights(tmp_path / "policy"), weights(tmp_path / "prm"))
    assert not (tmp_path / "kept.pt").exists()


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, probed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    probed[:] = [0.1]
    training.Run(TINY, tmp_path / "whole", tmp_path / "whole.pt").to_end(short_model=None)
    update, calls = Trainee.update, []

    def stopping(trainee: Trainee, rate: float) -> None:
        calls.append(rate)
        if len(calls) in (4, 12):  # once in each stage
            raise KeyboardInterrupt
        update(trainee, rate)

    monkeypatch.setattr(Trainee, "update", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            training.Run(TINY, tmp_path / "parts", tmp_path / "parts.pt").to_end(short_model=None)
        assert (tmp_path / "parts.pt").exists()
    training.Run(TINY, tmp_path / "parts", tmp_path / "parts.pt").to_end(short_model=None)
    assert equal(weights(tmp_path / "whole" / "prm"), weights(tmp_path / "parts" / "prm"))


def test_the_rate_is_flat_and_then_falls_to_zero(
    tmp_path: Path, probed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[tuple[int, float]] = []
    update = Trainee.update
    monkeypatch.setattr(Trainee, "update", lambda self, rate: (rates.append((self.tokens, rate)), update(self, rate)))
    training.Run(TINY, tmp_path, tmp_path / "kept.pt").to_end(short_model=None)
    short = [rate for _, rate in rates[: [tokens for tokens, _ in rates].index(0, 1)]]
    assert short[0] == 1.0 and 0 < short[-1] < 0.7
    assert all(rate == 1.0 or tokens > TINY.long.flat_tokens for tokens, rate in rates[len(short) :])
    assert 0 < rates[-1][1] < 0.5


def test_a_model_that_knows_short_problems_leaves_out_the_first_stage(tmp_path: Path, probed: list[float]) -> None:
    training.ship(small_network(3), tmp_path / "short")
    training.Run(TINY, tmp_path / "a", tmp_path / "a.pt").to_end(tmp_path / "short")
    training.Run(replace(TINY, short=Stage(3, 3, 9, 9)), tmp_path / "b", tmp_path / "b.pt").to_end(tmp_path / "short")
    assert equal(weights(tmp_path / "a" / "prm"), weights(tmp_path / "b" / "prm"))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.pt"
    torch.save({"recipe": asdict(replace(TINY, seed=7))}, path)
    with pytest.raises(ValueError, match="must be of this recipe"):
        training.Run(TINY, tmp_path, path)
