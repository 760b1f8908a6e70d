"""What has changed in a search's tree since the last report, for its live page."""

from __future__ import annotations

from typing import Any

from sglang_ets.core.tree import Node, SearchTree, node_dict


class TreeChanges:
    """Which steps of one tree have changed since the last report. Steps that are being generated wait."""

    def __init__(self) -> None:
        self._reported: dict[int, tuple[Any, ...]] = {}
        self._num_parts = 0

    def report(self, tree: SearchTree) -> dict[str, Any]:
        """New and changed steps in order of creation, as `return_tree` writes them. `part` counts from 1."""
        self._num_parts += 1
        nodes = [node_dict(node) for node in tree.nodes[1:] if self._has_changed(node)]
        return {"part": self._num_parts, "prompt_tokens": tree.prompt_tokens, "nodes": nodes}

    def _has_changed(self, node: Node) -> bool:
        if node.state == "open" and node.finish is None:
            return False
        now = (node.state, node.finish, node.score, node.allocation, node.cluster)
        if self._reported.get(node.id) == now:
            return False
        self._reported[node.id] = now
        return True
