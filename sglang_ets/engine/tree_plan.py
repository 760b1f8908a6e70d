"""Tells the attention backend `ets_tree` which KV the rows of the next decode share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sglang_ets.core.attention_plan import AttentionPlan, plan_paths
from sglang_ets.prm.stream import ForwardStream


class PlannedBackend(Protocol):
    """An attention backend that takes plans."""

    def load_plan(self, rids: Sequence[str], plan: AttentionPlan) -> None: ...


class TreePlanner:
    """Makes a plan when the rows of the decode batch, or the radix nodes at which they end, are others than before.

    Rows that pass through one radix node read the same KV, as long as each holds its lock. Where a row's own KV begins to
    be private does not change while it decodes, so rows that only grow keep their plan.
    """

    def __init__(self, tree_cache: Any, backend: PlannedBackend, stream: ForwardStream) -> None:
        self._cache = tree_cache
        self._backend = backend
        self._stream = stream
        self._key: tuple[tuple[str, int], ...] = ()

    def after_plan(self, batch: Any) -> None:
        """Called once per tick with the batch that runs next, or None."""
        if batch is None or not batch.forward_mode.is_decode():
            return
        key = tuple((req.rid, req.last_node) for req in batch.reqs)
        if key == self._key:
            return
        self._key = key
        plan = plan_paths(self._paths([node for _, node in key]))
        with self._stream.queued():
            self._backend.load_plan([rid for rid, _ in key], plan)

    def _paths(self, ends: Sequence[int]) -> list[list[tuple[int, int, int]]]:
        """Per row the radix nodes above its end, with the positions that they hold."""
        nodes = sorted(set(ends))
        infos = self._cache.tree_core.collect_path_info(nodes)
        paths = {
            node: [(span.node_id, span.path_start, span.path_end) for span in path]
            for node, path in zip(nodes, infos, strict=True)
        }
        return [paths[node] for node in ends]


def make_planner(scheduler: Any) -> Callable[[Any], None] | None:
    """What plans each tick; None unless the server's attention takes plans."""
    backend = scheduler.tp_worker.model_runner.attn_backend
    if not hasattr(backend, "load_plan"):
        return None
    return TreePlanner(scheduler.tree_cache, backend, ForwardStream(scheduler)).after_plan
