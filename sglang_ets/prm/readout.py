"""Hidden states of a step -> its score and its embedding."""

from __future__ import annotations

from typing import Any

import torch

from sglang_ets.kernels.step_pool import step_pool
from sglang_ets.kernels.step_score import step_score
from sglang_ets.prm.formats import Head, Readout, StepProbability, TokenRows


def token_log_probabilities(
    before: torch.Tensor,  # float[n, H], hidden states at the positions before the tokens
    token_ids: torch.Tensor,  # int64[n]
    head: torch.Tensor,  # float[V, H], rows of the language model head
) -> torch.Tensor:  # float32[n]
    """Log-probability of each token, in nats."""
    logits = (before @ head.T).float()
    return logits.log_softmax(-1).gather(1, token_ids.unsqueeze(1))[:, 0]


def head_score(
    hidden: torch.Tensor,  # float[n, H], hidden states of the step's tokens
    head: torch.nn.Module,
    spec: Head,
) -> float:
    """The head's label at the last token. All layers but the last run in torch, on one row."""
    states = hidden[-1:]
    layers = list(head) if isinstance(head, torch.nn.Sequential) else [head]
    for layer in layers[:-1]:
        states = layer(states.to(layer.weight.dtype) if isinstance(layer, torch.nn.Linear) else states)
    last, at = layers[-1], torch.zeros(1, dtype=torch.int64, device=hidden.device)
    return float(step_score(states, at, last.weight, last.bias, activation=spec.activation, index=spec.label)[0])


def rows_score(
    hidden: torch.Tensor,  # float[n, H]
    weight: torch.Tensor,  # float[V, H], the language model head
    spec: TokenRows,
) -> float:
    """The first token's share among the given ones at the last position; no other logit is computed."""
    rows = weight[torch.tensor(spec.token_ids, device=weight.device)]
    at = torch.zeros(1, dtype=torch.int64, device=hidden.device)
    return float(step_score(hidden[-1:], at, rows, None, activation=spec.activation, index=0)[0])


def read_score(
    spec: Readout,
    model: Any,
    before: torch.Tensor,  # float[n, H]
    hidden: torch.Tensor,  # float[n, H]
    token_ids: tuple[int, ...],  # n tokens of the step
    first: int,  # first token that counts
    parent_score: float | None,
) -> float:
    """The step's score under its format, in 0..1."""
    if isinstance(spec, Head):
        return head_score(hidden, model.score, spec)
    # sglang pads the head to a multiple of 64 rows; a padding row is zero, and its exp(0) would count in the softmax.
    weight = model.lm_head.weight[: model.config.vocab_size]
    if isinstance(spec, TokenRows):
        return rows_score(hidden, weight, spec)
    return _probability(spec, before[first:], token_ids[first:], weight, parent_score)


def _probability(
    spec: StepProbability,
    before: torch.Tensor,  # float[n, H]
    token_ids: tuple[int, ...],
    weight: torch.Tensor,  # float[V, H]
    parent_score: float | None,
) -> float:
    taken = token_log_probabilities(before, torch.tensor(token_ids, device=before.device), weight)
    if spec.reduce == "mean":
        return float(taken.mean().exp())
    own = float(taken.sum().exp())
    return own if parent_score is None else min(parent_score, own)


def embed_steps(
    hidden: torch.Tensor,  # float[T, H], the steps' tokens one after the other
    lengths: list[int],  # tokens of each step
) -> torch.Tensor:  # float32[S, H], unit norm
    """One embedding a step: the mean of its last hidden states."""
    offsets = torch.tensor([0, *lengths], device=hidden.device).cumsum(0)
    return step_pool(hidden, offsets)
