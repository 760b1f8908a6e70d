"""Finished steps, over all searches, on their way to the PRM and back."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from sglang_ets.engine.live import Branch, LiveSearch
from sglang_ets.prm.engine import PrmError, ScoreJob

if TYPE_CHECKING:
    from sglang_ets.engine.coordinator import SearchCoordinator

logger = logging.getLogger(__name__)

SCORE_BATCH_STEPS = 16  # finished steps that wait at most before the PRM runs, unless a level is complete earlier


class StepScoring:
    """Steps that wait for their score. One PRM batch serves all searches."""

    def __init__(self, coordinator: SearchCoordinator) -> None:
        self._coordinator = coordinator
        self._waiting: list[tuple[LiveSearch, int]] = []

    def add(self, live: LiveSearch, node_id: int) -> None:
        """Queue a finished step."""
        self._waiting.append((live, node_id))

    def run_when_due(self) -> None:
        """One PRM batch over all searches, when it is large enough or some search waits for nothing else."""
        while True:
            # Each round: a search may have ended in the one before.
            self._waiting = [job for job in self._waiting if not job[0].is_answered and not job[0].end_reason]
            # A step follows its parent's; best-of-N may have both waiting.
            batch = [(live, node) for live, node in self._waiting if self._parent(live, node).prm is not None]
            if not batch or (len(batch) < SCORE_BATCH_STEPS and all(live.children for live, _ in batch)):
                return
            self._waiting = [job for job in self._waiting if job not in batch]
            outcomes = self._score_batch(batch)
            for (live, node_id), outcome in zip(batch, outcomes, strict=True):
                with self._coordinator.guard(live):
                    self._scored(live, node_id, outcome)

    def _parent(self, live: LiveSearch, node_id: int) -> Branch:
        return live.branches[live.search.tree.nodes[node_id].parent.id]

    def _score_batch(self, batch: list[tuple[LiveSearch, int]]) -> list[Any]:
        """Outcomes in the order of the batch. A fault of the whole PRM call fails the searches in it, not the server."""
        started = time.perf_counter()
        try:
            outcomes = self._coordinator.prm.score([self._score_job(live, node_id) for live, node_id in batch])
        except Exception as error:  # the same boundary as `guard`, for a call that many searches share
            logger.exception("the PRM failed on a batch of %d steps", len(batch))
            outcomes = [PrmError(f"{type(error).__name__}: {error}")] * len(batch)
        self._coordinator.metrics.scored(len(batch), time.perf_counter() - started)
        return outcomes

    def _score_job(self, live: LiveSearch, node_id: int) -> ScoreJob:
        node = live.search.tree.nodes[node_id]
        parent = live.branches[node.parent.id]
        assert parent.prm is not None, "a parent keeps its PRM path until its last child is scored"
        return ScoreJob(parent.prm, node.parent.score, node.token_ids, node.text, node.depth)

    def _scored(self, live: LiveSearch, node_id: int, outcome: Any) -> None:
        parent_id = live.search.tree.nodes[node_id].parent.id
        if isinstance(outcome, PrmError):
            self._unscored(live, node_id, outcome)
            return
        score, path = outcome
        parent = live.branches.get(parent_id)
        if live.is_answered or live.end_reason or parent is None:
            self._coordinator.prm.drop([path])
            return
        live.prm_tokens += len(path.token_ids) - len(parent.prm.token_ids)
        live.branches[node_id].prm = path
        self._coordinator.one_score_less(live, parent_id)
        self._coordinator.apply(live, live.search.on_scored(node_id, score.score, score.embedding))

    def _unscored(self, live: LiveSearch, node_id: int, error: PrmError) -> None:
        """A step without a score ends its trajectory; one that has been continued already ends the search."""
        if live.is_answered:
            return
        if not live.branches[node_id].is_tip:
            self._coordinator.fail(live, str(error))
            return
        self._coordinator.one_score_less(live, live.search.tree.nodes[node_id].parent.id)
        self._coordinator.drop(live, [node_id])
        self._coordinator.apply(live, live.search.on_failed(node_id, str(error)))
