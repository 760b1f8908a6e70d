"""The search tree of one request: data and invariants, no decisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

State = Literal["open", "retained", "pruned", "complete", "failed"]
StepFinish = Literal["step", "stop", "length"]
NOT_FINITE = "the policy model's logits are not finite"  # a reason for which a step fails


class TreeBroken(RuntimeError):
    """A bug: an invariant of the search tree does not hold."""


@dataclass(eq=False, slots=True)
class Node:
    """One step. Written by `Search` only; others read."""

    id: int
    parent: Node | None
    depth: int
    index: int = 0  # among its parent's children
    subtree: int = 0  # DVTS group, fixed at depth 1
    level: int = 0  # in which its step is sampled, from 1: its depth, unless a leaf above it was revived
    token_ids: tuple[int, ...] = ()  # of this step alone
    text: str = ""
    finish: StepFinish | None = None  # None until the step is generated
    score: float | None = None
    embedding: NDArray[np.float32] | None = field(default=None, repr=False)  # float32[H]; dropped after selection
    allocation: int = 0  # children given by selection
    cluster: int | None = None
    state: State = "open"
    trajectory_tokens: int = 0  # tokens from the prompt's end to this step's end
    num_children: int = 0
    reason: str = ""  # why a failed node failed


class SearchTree:
    """Nodes in order of creation: a node's id is its place in `nodes`, and a parent comes before its children."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.root = Node(0, None, 0, state="retained")
        self.nodes = [self.root]

    def add_child(self, parent: Node, subtree: int | None = None, level: int | None = None) -> Node:
        """A new open node under `parent`, which keeps the parent's DVTS group and follows its level unless others are given."""
        group = parent.subtree if subtree is None else subtree
        level = parent.level + 1 if level is None else level
        node = Node(len(self.nodes), parent, parent.depth + 1, parent.num_children, group, level)
        parent.num_children += 1
        self.nodes.append(node)
        return node

    def set_step(self, node: Node, token_ids: Sequence[int], text: str, finish: StepFinish) -> None:
        """Fill in a generated step. A node gets one step in its life.

        Raises:
            TreeBroken: the node is not open or has a step already.
        """
        if node.state != "open" or node.finish is not None or node.parent is None:
            raise TreeBroken(f"node {node.id} got a second step: expected open without a step, got {node.state}")
        node.token_ids, node.text, node.finish = tuple(token_ids), text, finish
        node.trajectory_tokens = node.parent.trajectory_tokens + len(node.token_ids)

    def place(self, node: Node) -> tuple[int, ...]:
        """Where the node stands in the tree, whenever it was made: the index of each step of its path among its siblings."""
        return tuple(step.index for step in self.path(node))

    def by_place(self, nodes: Iterable[Node]) -> list[Node]:
        """These nodes by depth, then by place. Unless the levels of a search mix, that is the order of creation."""
        return sorted(nodes, key=lambda node: (node.depth, self.place(node)))

    def path(self, node: Node) -> list[Node]:
        """From the first step to `node`, without the root."""
        return list(self._upward(node))[::-1]

    def trajectory_token_ids(self, node: Node) -> tuple[int, ...]:
        """Policy model tokens from the prompt's end to the end of `node`'s step."""
        return tuple(token for step in self.path(node) for token in step.token_ids)

    def trajectory_text(self, node: Node) -> str:
        """Text from the prompt's end to the end of `node`'s step."""
        return "".join(step.text for step in self.path(node))

    def complete(self) -> list[Node]:
        """Last nodes of finished trajectories, in order of creation."""
        return [node for node in self.nodes if node.state == "complete"]

    def tips(self) -> list[Node]:
        """Last generated nodes of trajectories that were neither finished, pruned nor scored as failed."""
        live = [n for n in self.nodes[1:] if n.finish is not None and n.state in ("open", "retained")]
        inner = {n.parent.id for n in live if n.parent is not None}
        return [n for n in live if n.id not in inner]

    def check(self) -> None:
        """Check what must hold between events.

        Raises:
            TreeBroken: an invariant does not hold; both sides are named.
        """
        for place, node in enumerate(self.nodes):
            if node.id != place:
                raise TreeBroken(f"node at place {place} has id {node.id}; expected {place}")
            if node.parent is None:
                continue
            if node.parent.id >= node.id:
                raise TreeBroken(f"node {node.id} has parent {node.parent.id}; expected a smaller id")
            if node.parent.state in ("pruned", "complete", "open"):
                raise TreeBroken(f"node {node.id} hangs under node {node.parent.id}, which is {node.parent.state}")
            if node.finish is not None:
                expected = node.parent.trajectory_tokens + len(node.token_ids)
                if node.trajectory_tokens != expected:
                    raise TreeBroken(f"node {node.id} counts {node.trajectory_tokens} tokens; expected {expected}")

    def to_dict(self, *, with_embeddings: bool = False) -> dict[str, Any]:
        """Plain data for `return_tree`, numbered by place, so that equal trees are equal whatever was ready first."""
        ordered = [self.root, *self.by_place(self.nodes[1:])]
        number = {node.id: place for place, node in enumerate(ordered)}
        nodes = []
        for node in ordered[1:]:
            plain = node_dict(node)
            plain["id"], plain["parent"] = number[node.id], number[plain["parent"]]
            if with_embeddings:
                plain["embedding"] = None if node.embedding is None else np.round(node.embedding, 6).tolist()
            nodes.append(plain)
        return {"prompt_tokens": self.prompt_tokens, "nodes": nodes}

    def _upward(self, node: Node) -> Iterator[Node]:
        at: Node | None = node
        while at is not None and at.parent is not None:
            yield at
            at = at.parent


def node_dict(node: Node) -> dict[str, Any]:
    """One node as plain data, without its embedding; with its level where that is not its depth."""
    plain = {
        "id": node.id,
        "parent": node.parent.id if node.parent is not None else None,
        "depth": node.depth,
        "text": node.text,
        "token_ids": list(node.token_ids),
        "finish": node.finish,
        "score": node.score,
        "allocation": node.allocation,
        "cluster": node.cluster,
        "state": node.state,
        "reason": node.reason,
    }
    return plain if node.level == node.depth else {**plain, "level": node.level}
