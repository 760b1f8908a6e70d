"""What the client sends to a stock sglang server and how it reads the answers. Pure: no connection, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.tree import StepFinish


@dataclass(frozen=True)
class Growth:
    """Steps to sample after one trajectory."""

    token_ids: tuple[int, ...]  # prompt and trajectory
    node_ids: tuple[int, ...]  # the children, one step each
    max_new_tokens: int


@dataclass(frozen=True)
class Step:
    """One sampled step."""

    token_ids: tuple[int, ...]
    text: str
    finish: StepFinish


@dataclass(frozen=True)
class Scoring:
    """One step to score: `token_ids` end with it, it begins at `start`, its tokens count from `first` on."""

    token_ids: tuple[int, ...]
    start: int
    first: int  # place in `token_ids`; start <= first < len(token_ids)


def generate_request(growths: Sequence[Growth], config: SearchConfig, temperature: float) -> dict[str, Any]:
    """Body of one `/generate` call that samples a whole level; its answers come in the order of the children.

    A single trajectory uses `n`, which computes its prompt once. With several, every child is a row of its own: the
    server has the parents' KV from the call before, so that a row extends one token, and rows may differ in number.
    """
    params = {"temperature": temperature, "stop": list(_texts(config)), "no_stop_trim": True}
    params |= {"stop_token_ids": ids} if (ids := _ids(config)) else {}
    if len(growths) == 1:
        only = growths[0]
        params |= {"max_new_tokens": only.max_new_tokens, "n": len(only.node_ids)}
        return {"input_ids": list(only.token_ids), "sampling_params": params}
    rows = [growth for growth in growths for _ in growth.node_ids]
    return {
        "input_ids": [list(row.token_ids) for row in rows],
        "sampling_params": [{**params, "max_new_tokens": row.max_new_tokens} for row in rows],
    }


def read_steps(answers: Sequence[Mapping[str, Any]] | Mapping[str, Any], config: SearchConfig) -> list[Step]:
    """The sampled steps, in order. `answers` is the JSON of a `/generate` call: a list, or one object for a single row.

    Raises:
        RuntimeError: the server gave up a row.
    """
    return [_step(answer, config) for answer in ([answers] if isinstance(answers, Mapping) else answers)]


def _step(answer: Mapping[str, Any], config: SearchConfig) -> Step:
    reason = answer["meta_info"]["finish_reason"]
    if reason["type"] not in ("stop", "length"):
        raise RuntimeError(f"the policy model's server ended a step with {reason}")
    finish: StepFinish = "length"
    if reason["type"] == "stop":
        finish = "step" if reason.get("matched") in config.step_delimiter else "stop"
    return Step(tuple(answer["output_ids"]), answer["text"], finish)


def score_request(scorings: Sequence[Scoring]) -> dict[str, Any]:
    """Body of one `/generate` call that reads the probabilities of the steps' tokens and samples nothing.

    Log-probabilities begin one token before the step, so that the PRM's server may reuse the KV of all that is older.
    """
    return {
        "input_ids": [list(scoring.token_ids) for scoring in scorings],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [scoring.start - 1 for scoring in scorings],
    }


def read_scores(answers: Sequence[Mapping[str, Any]] | Mapping[str, Any], scorings: Sequence[Scoring]) -> list[float]:
    """Per step the product of the probabilities of its tokens from `first` on.

    Raises:
        RuntimeError: an answer does not hold the log-probability of every token of its step.
    """
    listed = [answers] if isinstance(answers, Mapping) else answers
    return [_score(answer, scoring) for answer, scoring in zip(listed, scorings, strict=True)]


def _score(answer: Mapping[str, Any], scoring: Scoring) -> float:
    # Entries are [log-probability, token id, text]; the last ones belong to the step, and the very first is null. The ids
    # are not compared: sglang reports the last id of a vocabulary as 0.
    num_step = len(scoring.token_ids) - scoring.start
    log_probs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][-num_step:]]
    counted = log_probs[scoring.first - scoring.start :]
    if len(log_probs) != num_step or None in counted:
        raise RuntimeError(
            f"the PRM's server gave {log_probs} for a step of {num_step} tokens, expected a number for each"
        )
    return math.exp(math.fsum(counted))


def scoring_of(
    path_ids: tuple[int, ...], step_ids: tuple[int, ...], texts: Sequence[str], marker: str | None
) -> Scoring:
    """A step after `path_ids`. `texts` are its tokens one by one; what comes up to the first `marker` does not count.

    Without a marker in it, or with nothing after the marker, the whole step counts: as in the PRM's model card.
    """
    start = len(path_ids)
    hit = next((place for place, text in enumerate(texts) if marker is not None and marker in text), -1)
    skipped = hit + 1 if hit + 1 < len(texts) else 0
    return Scoring(path_ids + step_ids, start, start + skipped)


def _texts(config: SearchConfig) -> tuple[str, ...]:
    return tuple(delimiter for delimiter in config.step_delimiter if isinstance(delimiter, str))


def _ids(config: SearchConfig) -> list[int]:
    return [delimiter for delimiter in config.step_delimiter if isinstance(delimiter, int)]
