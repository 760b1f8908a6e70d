"""Hidden states of steps -> their scores and their embeddings, all steps of a batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_ets.kernels.step_pool import step_pool
from sglang_ets.kernels.step_score import step_score
from sglang_ets.prm.formats import Head, Readout, StepProbability, TokenRows
from sglang_ets.prm.vocabulary import Vocabulary

CHUNK_TOKENS = 256  # of which all logits exist at once: 160 MB in float32 at 152,000 words


@dataclass(frozen=True)
class StepStates:
    """One step of n tokens as the PRM has seen it; `hidden` of a step of none is the last state before it."""

    before: torch.Tensor  # float[n, H], hidden states at the positions before the tokens
    hidden: torch.Tensor  # float[n, H], at the tokens
    words: slice  # whose states make the embedding
    token_ids: tuple[int, ...]  # n
    first: int  # first token that counts for a probability
    parent_score: float | None


def read_steps(
    spec: Readout, model: Any, steps: Sequence[StepStates], group: Any = None
) -> tuple[list[float], NDArray[np.float32]]:  # S scores; float32[S, H] embeddings of unit norm
    """Scores under the format, in 0..1, and embeddings. Synchronises once.

    `group`: of the tensor-parallel ranks over which the model is split; None: it is all here. A step whose score or embedding
    is not finite has a score of NaN.
    """
    scores = _scores(spec, model, steps, group)
    words = [step.hidden[step.words] for step in steps]
    embeddings = embed_steps(torch.cat(words), [len(states) for states in words])
    table = torch.cat([scores.unsqueeze(1), embeddings], dim=1).cpu().numpy()
    own = np.where(np.isfinite(table).all(axis=1), table[:, 0], np.nan).tolist()
    return [_along_path(spec, score, step) for score, step in zip(own, steps, strict=True)], table[:, 1:]


def _along_path(spec: Readout, own: float, step: StepStates) -> float:
    """A product of probabilities cannot be made good by later steps. NaN stays NaN, which `min` would lose."""
    is_product = isinstance(spec, StepProbability) and spec.reduce == "product"
    return min(step.parent_score, own) if is_product and step.parent_score is not None and not math.isnan(own) else own


def _scores(spec: Readout, model: Any, steps: Sequence[StepStates], group: Any) -> torch.Tensor:  # float32[S]
    if isinstance(spec, Head):
        return head_scores(_last_states(steps), model.score, spec)
    vocabulary = Vocabulary(model.lm_head, model.config.vocab_size, group)
    if isinstance(spec, TokenRows):
        return rows_scores(_last_states(steps), vocabulary.rows(spec.token_ids), spec)
    before = torch.cat([step.before[step.first :] for step in steps])
    token_ids = torch.tensor([token for step in steps for token in step.token_ids[step.first :]]).to(before.device)
    lengths = torch.tensor([len(step.token_ids) - step.first for step in steps]).to(before.device)
    taken = token_log_probabilities(before, token_ids, vocabulary)
    reduced = "mean" if spec.reduce == "mean" else "sum"
    # Its own check of the lengths would wait for the device.
    return torch.segment_reduce(taken, reduced, lengths=lengths, unsafe=True).exp()


def _last_states(steps: Sequence[StepStates]) -> torch.Tensor:  # float[S, H]
    return torch.stack([step.hidden[-1] for step in steps])


def token_log_probabilities(
    before: torch.Tensor,  # float[n, H], hidden states at the positions before the tokens
    token_ids: torch.Tensor,  # int64[n]
    vocabulary: Vocabulary,
) -> torch.Tensor:  # float32[n]
    """Log-probability of each token, in nats."""
    pieces = []
    for states, ids in zip(before.split(CHUNK_TOKENS), token_ids.split(CHUNK_TOKENS), strict=True):
        pieces.append(vocabulary.logits(states).float().log_softmax(-1).gather(1, ids.unsqueeze(1))[:, 0])
    return torch.cat(pieces)


def head_scores(
    states: torch.Tensor,  # float[S, H], hidden states at the last tokens of the steps
    head: torch.nn.Module,
    spec: Head,
) -> torch.Tensor:  # float32[S]
    """The head's label at each last token. All layers but the last run in torch."""
    layers = list(head) if isinstance(head, torch.nn.Sequential) else [head]
    for layer in layers[:-1]:
        states = layer(states.to(layer.weight.dtype) if isinstance(layer, torch.nn.Linear) else states)
    last, at = cast(torch.nn.Linear, layers[-1]), torch.arange(len(states))
    return step_score(states, at, last.weight, last.bias, activation=spec.activation, index=spec.label)


def rows_scores(
    states: torch.Tensor,  # float[S, H], hidden states at the last tokens of the steps
    rows: torch.Tensor,  # float[k, H], of the language model head: the format's tokens
    spec: TokenRows,
) -> torch.Tensor:  # float32[S]
    """The first token's share among the given ones at each last token; no other logit is computed."""
    return step_score(states, torch.arange(len(states)), rows, None, activation=spec.activation, index=0)


def embed_steps(
    hidden: torch.Tensor,  # float[T, H], the steps' tokens one after the other
    lengths: list[int],  # tokens of each step
) -> torch.Tensor:  # float32[S, H], unit norm
    """One embedding a step: the mean of its last hidden states."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(hidden.device)
    embeddings: torch.Tensor = step_pool(hidden, offsets)
    return embeddings
