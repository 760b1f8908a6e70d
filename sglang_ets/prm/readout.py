"""Hidden states of a step -> its score and its embedding."""

from __future__ import annotations

from typing import Any

import torch

from sglang_ets.kernels.step_pool import step_pool
from sglang_ets.kernels.step_score import step_score
from sglang_ets.prm.formats import Likelihood, TokenClassification


def likelihood_score(
    before: torch.Tensor,  # float[n, H], hidden states at the positions before the tokens
    token_ids: torch.Tensor,  # int64[n]
    head: torch.Tensor,  # float[V, H], rows of the language model head
) -> float:
    """Product of the probabilities of the tokens."""
    logits = (before @ head.T).float()
    return float(logits.log_softmax(-1).gather(1, token_ids.unsqueeze(1)).sum().exp())


def class_score(
    hidden: torch.Tensor,  # float[n, H], hidden states of the step's tokens
    score: torch.nn.Linear,
    label: int,
) -> float:
    """Softmax probability of `label` at the last token."""
    last = torch.tensor([hidden.shape[0] - 1], device=hidden.device)
    return float(step_score(hidden, last, score.weight, score.bias, activation="softmax", index=label)[0])


def read_score(
    spec: Likelihood | TokenClassification,
    model: Any,
    before: torch.Tensor,  # float[n, H]
    hidden: torch.Tensor,  # float[n, H]
    token_ids: tuple[int, ...],  # n tokens of the step
    first: int,  # first token that counts
    parent_score: float | None,
) -> float:
    """The step's score under its format, in 0..1."""
    if isinstance(spec, TokenClassification):
        return class_score(hidden, model.score, spec.label)
    ids = torch.tensor(token_ids[first:], device=hidden.device)
    # sglang pads the head to a multiple of 64 rows; a padding row is zero, and its exp(0) would count in the softmax.
    own = likelihood_score(before[first:], ids, model.lm_head.weight[: model.config.vocab_size])
    return own if parent_score is None else min(parent_score, own)


def embed_steps(
    hidden: torch.Tensor,  # float[T, H], the steps' tokens one after the other
    lengths: list[int],  # tokens of each step
) -> torch.Tensor:  # float32[S, H], unit norm
    """One embedding a step: the mean of its last hidden states."""
    offsets = torch.tensor([0, *lengths], device=hidden.device).cumsum(0)
    return step_pool(hidden, offsets)
