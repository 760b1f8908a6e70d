"""What has changed in a search's tree since the last report, for its live page."""

from __future__ import annotations

from typing import Any

from sglang_ets.core.tree import Node, SearchTree, node_dict


class TreeNews:
    """Which steps of one tree have changed since they were last told. Steps that are being generated wait."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[Any, ...]] = {}
        self._num_parts = 0

    def take(self, tree: SearchTree) -> dict[str, Any]:
        """New and changed steps in order of creation, as `return_tree` writes them. `part` counts from 1."""
        self._num_parts += 1
        nodes = [node_dict(node) for node in tree.nodes[1:] if self._is_new(node)]
        return {"part": self._num_parts, "prompt_tokens": tree.prompt_tokens, "nodes": nodes}

    def _is_new(self, node: Node) -> bool:
        if node.state == "open" and node.finish is None:
            return False
        now = (node.state, node.finish, node.score, node.allocation, node.cluster)
        if self._told.get(node.id) == now:
            return False
        self._told[node.id] = now
        return True
