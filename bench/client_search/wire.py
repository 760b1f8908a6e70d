"""What the client sends to `/generate` of a stock sglang server and how it reads the answers. Pure: no connection, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.search import Expand
from sglang_ets.core.tree import StepFinish

TokenIds = tuple[int, ...]
Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Scoring:
    """One step to score: `token_ids` end with it, it begins at `start`, its tokens count from `first` on."""

    token_ids: TokenIds
    start: int
    first: int  # place in `token_ids`; start <= first < len(token_ids)


def generate_request(
    growths: Sequence[tuple[TokenIds, Expand]],  # prompt and trajectory, and the children that it gets
    config: SearchConfig,
    temperature: float,
) -> dict[str, Any]:
    """Body of one call that samples a whole level; its answers come in the order of the children.

    A single trajectory uses `n`, which computes its prompt once. With several, every child is a row of its own: the
    server has the parents' KV from the call before, so that a row extends one token, and rows may differ in number.
    """
    params = {"temperature": temperature, "stop": list(config.step_delimiter), "no_stop_trim": True}
    if len(growths) == 1:
        [(token_ids, only)] = growths
        params |= {"max_new_tokens": only.max_new_tokens, "n": len(only.node_ids)}
        return {"input_ids": list(token_ids), "sampling_params": params}
    rows = [(token_ids, expand) for token_ids, expand in growths for _ in expand.node_ids]
    return {
        "input_ids": [list(token_ids) for token_ids, _ in rows],
        "sampling_params": [{**params, "max_new_tokens": expand.max_new_tokens} for _, expand in rows],
    }


def score_request(scorings: Sequence[Scoring]) -> dict[str, Any]:
    """Body of one call that reads the probabilities of the steps' tokens and samples nothing.

    Log-probabilities begin one token before the step, so that the PRM's server may reuse the KV of all that is older.
    """
    return {
        "input_ids": [list(scoring.token_ids) for scoring in scorings],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [scoring.start - 1 for scoring in scorings],
    }


def listed(answers: Sequence[Answer] | Answer) -> Sequence[Answer]:
    """The JSON of an answer: a list, or one object for a single row."""
    return [answers] if isinstance(answers, Mapping) else answers


def finish_of(answer: Answer, config: SearchConfig) -> StepFinish:
    """How a sampled step ended.

    Raises:
        RuntimeError: the server gave up the row.
    """
    reason = answer["meta_info"]["finish_reason"]
    if reason["type"] not in ("stop", "length"):
        raise RuntimeError(f"the policy model's server ended a step with {reason}")
    if reason["type"] == "length":
        return "length"
    return "step" if reason.get("matched") in config.step_delimiter else "stop"


def score_of(answer: Answer, scoring: Scoring) -> float:
    """The product of the probabilities of a step's tokens from `first` on.

    Raises:
        RuntimeError: the answer does not hold the log-probability of every token of its step.
    """
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


def scoring_of(path_ids: TokenIds, step_ids: TokenIds, texts: Sequence[str], marker: str | None) -> Scoring:
    """A step after `path_ids`. `texts` are its tokens one by one; what comes up to the first `marker` does not count.

    Without a marker in it, or with nothing after the marker, the whole step counts: as in the PRM's model card.
    """
    start = len(path_ids)
    hit = next((place for place, text in enumerate(texts) if marker is not None and marker in text), -1)
    skipped = hit + 1 if hit + 1 < len(texts) else 0
    return Scoring(path_ids + step_ids, start, start + skipped)
