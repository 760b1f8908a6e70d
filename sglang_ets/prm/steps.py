"""Steps on their way to a score: what a search hands over, what it gets back, and what scores steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sglang_ets.kv import Hold


class PrmError(RuntimeError):
    """A step that the PRM could not score; returned, not raised."""


@dataclass(frozen=True)
class StepScore:
    """What the PRM says about one step."""

    score: float  # 0..1
    embedding: NDArray[np.float32]  # float32[H], unit norm


@dataclass(eq=False)
class PrmPath:
    """The PRM's side of one trajectory: its tokens with the prompt, and the lock on their KV.

    The lock may have been given up: then the KV is computed again when a step behind it is scored.
    """

    token_ids: tuple[int, ...]
    hold: Hold

    @property
    def owner(self) -> str:
        """The search that the path belongs to."""
        return self.hold.owner


@dataclass(frozen=True, eq=False)
class SampledStates:
    """The policy model's last hidden states from which the tokens of one step were sampled."""

    total: NDArray[np.float32]  # float32[H], their sum
    last: NDArray[np.float32]  # float32[H], that of the step's last token
    count: int  # tokens

    def plus(self, state: NDArray[np.float32]) -> SampledStates:
        """With one more token, sampled from `state` (float32[H], a row of a batch, which is not kept)."""
        return SampledStates(self.total + state, state.copy(), self.count + 1)

    @classmethod
    def first(cls, state: NDArray[np.float32]) -> SampledStates:
        """Of a step that has one token."""
        return cls(state.copy(), state.copy(), 1)


@dataclass(frozen=True)
class ScoreJob:
    """One finished step to score."""

    parent: PrmPath
    parent_score: float | None
    step_ids: tuple[int, ...]
    step_text: str
    depth: int
    states: SampledStates | None = None  # if the scorer reads them


Outcome = tuple[StepScore, PrmPath] | PrmError


class StepScorer(Protocol):
    """Scores the steps of all searches of a scheduler, on its thread."""

    reads_states: bool  # jobs must bring the states of their steps

    @property
    def pool_tokens(self) -> int:
        """Tokens of its KV pool."""

    def init_memory_pools(self) -> None:
        """Allocate what it needs beside weights, once the policy model's pool has its size."""

    def refusal(self, prompt_ids: Sequence[int], question: str, max_tokens: int) -> str | None:
        """Why it cannot read every trajectory of such a search; one sentence, or None."""

    def open_prompt(self, prompt_ids: Sequence[int], question: str, owner: str) -> PrmPath:
        """Bring a prompt in, once per search, whose id is `owner`. Raises PrmError if it does not fit."""

    def score(self, jobs: Sequence[ScoreJob]) -> Sequence[Outcome]:
        """Outcomes in the order of the jobs."""

    def release(self, path: PrmPath) -> None:
        """Unlock; the KV stays cached until it is needed. Idempotent."""

    def drop(self, paths: Sequence[PrmPath]) -> int:
        """Unlock and free at once what only these paths hold. Returns the tokens freed. Idempotent."""

    def num_releases(self, owner: str) -> int:
        """Locks that a search has had to give up."""

    def end_owner(self, owner: str) -> None:
        """Check that a search holds nothing any more. Raises RuntimeError if it does."""

    def forget(self) -> None:
        """The weights or the memory may have changed. Called while no search runs."""

    def stats(self) -> dict[str, Any]:
        """For `/server_info`."""
