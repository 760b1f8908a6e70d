"""Finished steps, over all searches, on their way to the PRM and back."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from sglang_ets.engine.live import Branch, LiveSearch
from sglang_ets.engine.metrics import NoMetrics
from sglang_ets.prm.steps import Outcome, PrmError, ScoreJob, StepScorer

logger = logging.getLogger(__name__)

SCORE_BATCH_STEPS = 16  # finished steps that wait at most before the PRM runs, unless a level is complete earlier

Waiting = tuple[LiveSearch, int]  # a search, and the node whose step waits


class StepScoring:
    """Steps that wait for their score. One PRM batch serves all searches."""

    def __init__(self, prm: StepScorer, metrics: NoMetrics) -> None:
        self._prm = prm
        self._metrics = metrics
        self._waiting: list[Waiting] = []

    def add(self, live: LiveSearch, node_id: int) -> None:
        """Queue a finished step."""
        self._waiting.append((live, node_id))

    def outcomes(self) -> Iterator[tuple[LiveSearch, int, Outcome]]:
        """Scores of the steps that are due, in the order they came.

        A PRM batch runs when it is large enough or when some search waits for nothing else. Between two outcomes the caller
        may queue steps and end searches; steps of searches that have ended by then are not scored.
        """
        while batch := self._due():
            taken = set(batch)
            self._waiting = [job for job in self._waiting if job not in taken]
            for (live, node_id), outcome in zip(batch, self._score(batch), strict=True):
                yield live, node_id, outcome

    def _due(self) -> list[Waiting]:
        self._waiting = [(live, node_id) for live, node_id in self._waiting if not live.has_ended]
        # A step follows its parent's; best-of-N may have both waiting.
        batch = [(live, node_id) for live, node_id in self._waiting if _parent(live, node_id).prm is not None]
        if len(batch) < SCORE_BATCH_STEPS and all(live.children for live, _ in batch) and not _is_early(batch):
            return []
        return batch

    def _score(self, batch: Sequence[Waiting]) -> Sequence[Outcome]:
        """Outcomes in the order of the batch. A fault of the whole PRM call fails the searches in it, not the server."""
        started = time.perf_counter()
        outcomes: Sequence[Outcome]
        try:
            outcomes = self._prm.score([_job(live, node_id) for live, node_id in batch])
        except (
            Exception
        ) as error:  # the same boundary as the coordinator's `guard`, for a call that many searches share
            logger.exception("the PRM failed on a batch of %d steps", len(batch))
            outcomes = [PrmError(f"{type(error).__name__}: {error}")] * len(batch)
        self._metrics.scored(len(batch), time.perf_counter() - started)
        return outcomes


def _is_early(batch: Sequence[Waiting]) -> bool:
    """Whether a search wants the scores of its steps here, though others of its level still run."""
    return any(live.search.wants_scores(count) for live, count in Counter(live for live, _ in batch).items())


def _parent(live: LiveSearch, node_id: int) -> Branch:
    return live.branches[live.parent_id(node_id)]


def _job(live: LiveSearch, node_id: int) -> ScoreJob:
    node = live.search.tree.nodes[node_id]
    parent = live.parent_of(node)
    path = live.branches[parent.id].prm
    assert path is not None, "a parent keeps its PRM path until its last child is scored"
    return ScoreJob(path, parent.score, node.token_ids, node.text, node.depth, live.branches[node_id].states)
