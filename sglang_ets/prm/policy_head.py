"""A PRM without a forward pass of its own: a linear head on the hidden states from which the policy model samples.

A step's score is read from the state that chose its last token, and its embedding is the mean of the states that chose its
tokens. All of them exist once the step has ended, so there are no second weights, no second KV pool and no second pass. Only a
search inside the engine sees these states.

The head is a folder with `policy_head.safetensors`: `weight` float32[H] and `bias` float32[1], and the score is
sigmoid(state @ weight + bias); and with `prm_config.json`, whose `layer` says after how many layers of the model the states are
taken. Without it they are those that the next token is chosen from. `python -m bench.testbed.prm_head` learns one from the
model's own rollouts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sglang_ets.core.clusters import MIN_NORM
from sglang_ets.kv import Hold
from sglang_ets.prm.choose import CONFIG_FILE, POLICY_HEAD, read_json
from sglang_ets.prm.ranks import ONE_RANK, Ranks
from sglang_ets.prm.steps import Outcome, PrmError, PrmPath, SampledStates, ScoreJob, StepScore

logger = logging.getLogger(__name__)

HEAD_FILE = "policy_head.safetensors"
NO_NODE = -1


@dataclass(frozen=True, eq=False)
class LinearHead:
    """The probability that the answer will be right: sigmoid(state @ weight + bias)."""

    weight: NDArray[np.float64]  # float64[H]
    bias: float
    layer: int | None = (
        None  # states after so many layers; None: the last ones, normalised, that tokens are chosen from
    )

    def scores(self, states: NDArray[np.floating]) -> NDArray[np.float64]:
        """float64[K] in 0..1 of float[K, H]."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(1 / (1 + np.exp(-(states @ self.weight + self.bias))), dtype=np.float64)

    def save(self, folder: Path) -> None:
        """Write a folder that `--prm-model-path` takes."""
        weight, bias = self.weight.astype(np.float32), np.array([self.bias], dtype=np.float32)
        save_file({"weight": weight, "bias": bias}, folder / HEAD_FILE)
        about: dict[str, Any] = {"format": POLICY_HEAD, **({} if self.layer is None else {"layer": self.layer})}
        (folder / CONFIG_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str) -> LinearHead:
        """Read what `save` wrote.

        Raises:
            SystemExit: there is no such file, or it holds something else.
        """
        path = Path(folder) / HEAD_FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise SystemExit(
                f"--prm-format {POLICY_HEAD} reads {HEAD_FILE} in the folder of --prm-model-path, got {error}; learn a head "
                "with `python -m bench.testbed.prm_head`"
            ) from error
        shapes = {name: tensor.shape for name, tensor in sorted(tensors.items())}
        if list(shapes) != ["bias", "weight"] or shapes["bias"] != (1,) or len(shapes["weight"]) != 1:
            raise SystemExit(f"{path} must hold weight [H] and bias [1], got {shapes}; write it with LinearHead.save")
        layer = read_json(folder, CONFIG_FILE).get("layer")
        if layer is not None and not (isinstance(layer, int) and layer > 0):
            raise SystemExit(
                f"layer in {Path(folder) / CONFIG_FILE} must be a positive number of layers, got {layer!r}"
            )
        return cls(tensors["weight"].astype(np.float64), float(tensors["bias"][0]), layer)


class PolicyHead:
    """Scores steps by what their own decoding has left behind. Holds no KV and locks nothing."""

    reads_states = True

    def __init__(self, head: LinearHead, scheduler: Any, ranks: Ranks = ONE_RANK) -> None:
        self._head = head
        self._scheduler = scheduler
        self._ranks = ranks
        no_number = np.full(head.weight.size, np.nan, dtype=np.float32)
        self._nothing = SampledStates(
            no_number, no_number, 1
        )  # in place of what a step lacks: ranks must score as many steps

    @classmethod
    def load(cls, folder: str, scheduler: Any, ranks: Ranks) -> PolicyHead:
        """The head in `folder`, for the policy model of this scheduler.

        Raises:
            SystemExit: there is none, or it was made for a model of another hidden size or with more layers.
        """
        head, size = LinearHead.load(folder), scheduler.model_config.hidden_size
        if head.layer is not None and head.layer >= (num_layers := scheduler.model_config.num_hidden_layers):
            raise SystemExit(
                f"the head in {folder} must read a layer below the policy model's {num_layers}, got {head.layer}; learn one "
                "for this model"
            )
        if head.weight.size != size:
            raise SystemExit(
                f"the head in {folder} must have {size} weights, as many as the policy model has hidden dimensions, got "
                f"{head.weight.size}; learn one for this model"
            )
        return cls(head, scheduler, ranks)

    @property
    def pool_tokens(self) -> int:
        """Tokens of the policy model's KV pool, which holds all that there is to hold."""
        return int(self._scheduler.max_total_num_tokens)

    def init_memory_pools(self) -> None:
        """Nothing to allocate."""
        where = "" if self._head.layer is None else f" after {self._head.layer} layers"
        logger.info(
            "PRM ready: a head on the policy model's own states%s, without a pass or a KV pool of its own", where
        )

    def refusal(self, _prompt_ids: Sequence[int], _question: str, _max_tokens: int) -> str | None:
        """None: what the policy model can generate is read already."""
        return None

    def open_prompt(self, _prompt_ids: Sequence[int], _question: str, owner: str) -> PrmPath:
        """The path of every trajectory, which holds nothing."""
        return PrmPath((), Hold(owner, NO_NODE))

    def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        """Outcomes in the order of the jobs; a PrmError for a step that has not brought the states of all its tokens, and for
        one whose score or embedding is no number."""
        states = [job.states if job.states is not None and _is_whole(job) else self._nothing for job in jobs]
        scores = self._head.scores(np.stack([one.last for one in states]))
        embeddings = unit_means(states)
        own = np.where(np.isfinite(embeddings).all(axis=1), scores, np.nan).tolist()
        own = self._ranks.from_first(own)  # reductions may differ in the last bit per rank
        return [
            (StepScore(score, embedding), job.parent) if np.isfinite(score) else _unscored(job, score)
            for job, score, embedding in zip(jobs, own, embeddings, strict=True)
        ]

    def release(self, path: PrmPath) -> None:
        """Nothing is locked."""

    def drop(self, _paths: Sequence[PrmPath]) -> int:
        """Nothing is held."""
        return 0

    def num_releases(self, _owner: str) -> int:
        """None ever."""
        return 0

    def end_owner(self, owner: str) -> None:
        """Nothing to check."""

    def forget(self) -> None:
        """Nothing is cached."""

    def stats(self) -> dict[str, Any]:
        """For `/server_info`: as of any PRM."""
        nothing = ("pool_tokens", "held_kv_tokens", "locks", "locks_given_up", "tokens_extended", "tokens_if_rescored")
        return {
            "format": POLICY_HEAD,
            "shares_policy_weights": True,
            "shares_policy_tokens": True,
            "context_tokens": int(self._scheduler.model_config.context_len),
            "ranks": 1,
            **dict.fromkeys(nothing, 0),
        }


def unit_means(states: Sequence[SampledStates]) -> NDArray[np.float32]:
    """float32[S, H] of unit norm; zero where the mean is zero, and no number where it is none."""
    means = np.stack([one.total / np.float32(one.count) for one in states])
    with np.errstate(invalid="ignore"):
        norms = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.float32(MIN_NORM))
        return np.asarray(means / norms, dtype=np.float32)


def _is_whole(job: ScoreJob) -> bool:
    return job.states is not None and job.states.count == len(job.step_ids)


def _unscored(job: ScoreJob, score: float) -> PrmError:
    if not _is_whole(job):
        count = 0 if job.states is None else job.states.count
        return PrmError(
            f"a step of {len(job.step_ids)} tokens must bring a hidden state for each of them, got {count}; report this fault"
        )
    return PrmError(
        f"the head's score of the step is {score}, no finite number; check its weights and the model's dtype"
    )
