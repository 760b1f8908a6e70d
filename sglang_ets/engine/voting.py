"""The end of a search, off the scheduler loop: ranks the trajectories, with votes joined by the value of their answers.

`1/2`, `0.5` and `\\frac{1}{2}` are three texts and one vote. Integers are equal as texts already, so a search whose answers
are all integers asks nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import regex

from sglang_ets.core.answer import RankedAnswer, Trajectory, rank
from sglang_ets.core.config import SearchConfig
from sglang_ets.math_process import MathProcess

logger = logging.getLogger(__name__)

ASK_LIMIT_S = 5.0  # all answers of one search; then their texts decide
MAX_ANSWER_CHARS = 300  # a longer one is compared as text


class Voting:
    """Ranks on a thread of its own, so that a slow comparison holds up neither the loop nor another search's selection."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sglang-ets-answer")
        self._process = MathProcess()

    def submit(
        self,
        trajectories: Sequence[Trajectory],
        config: SearchConfig,
        warn: Callable[[str], None] = logger.warning,
    ) -> Future[list[RankedAnswer]]:
        """Ranked answers, best first: see `answer.rank`. What was not as it should be goes to `warn` before they are there."""
        same = partial(self.labels, warn=warn) if config.answer_equality == "math" else None
        return self._thread.submit(rank, trajectories, config, same)

    def labels(self, answers: Sequence[str], warn: Callable[[str], None] = logger.warning) -> list[int]:
        """A label for each of these different texts; equal labels mean equal values. Never fails: texts decide at worst."""
        labels = list(range(len(answers)))
        short = [i for i, answer in enumerate(answers) if len(answer) <= MAX_ANSWER_CHARS]
        if all(regex.fullmatch(r"-?\d+", answers[i]) for i in short):
            return labels
        by_value = self._process.ask([answers[i] for i in short], ASK_LIMIT_S)
        if by_value is None:
            warn(
                f"answers were not compared in {ASK_LIMIT_S:g} s or the process that does it died; equal texts voted instead"
            )
            return labels
        for place, label in zip(short, by_value, strict=True):
            labels[place] = short[label]
        return labels
