"""One search's state machine: expand, score, select, prune, until no width is left. Knows no engine.

Events come in through the `on_*` methods, actions go out as their results. Deterministic: equal events in equal order give
equal actions. All policies wait for a level to be complete, except best-of-N, whose trajectories never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.answer import Trajectory
from sglang_ets.core.clusters import RunningCenter
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import CostTree
from sglang_ets.core.selection import Level, Selection, num_groups
from sglang_ets.core.tree import Node, SearchTree, StepFinish


@dataclass(frozen=True)
class Expand:
    """Sample one step for each of `node_ids`, children of `parent_id` (0: the prompt)."""

    parent_id: int
    node_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Score:
    """Let the PRM score this node's step."""

    node_id: int


@dataclass(frozen=True)
class Measure:
    """A level is complete: sample the KV held."""

    depth: int


@dataclass(frozen=True)
class Select:
    """Choose among these leaves: `level`, then the policy, then `on_selected`."""

    leaf_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prune:
    """These nodes go no further; what only they hold is free."""

    node_ids: tuple[int, ...]


@dataclass(frozen=True)
class Complete:
    """This node ends a trajectory; its KV is not needed any more."""

    node_id: int


@dataclass(frozen=True)
class Finish:
    """The search is over; `trajectories` has its results."""

    reason: str


Action = Expand | Score | Measure | Select | Prune | Complete | Finish


class Search:
    """One search from the first expansion to its trajectories."""

    def __init__(self, config: SearchConfig, prompt_tokens: int) -> None:
        self.config = config
        self.tree = SearchTree(prompt_tokens)
        self.remaining_width = config.width
        self.is_over = False
        self._open: dict[int, None] = {}  # nodes without a score yet, in order of creation
        self._level: list[Node] = []  # nodes of the level that is being made
        self._leaves: list[Node] = []  # what `Select` asked about
        self._num_measured = 0
        self._center = RunningCenter()

    @property
    def _waits_for_levels(self) -> bool:
        return self.config.algorithm != "best_of_n"

    def start(self) -> list[Action]:
        """The first level: `width` steps from the prompt. DVTS deals them out to its subtrees."""
        root = self.tree.root
        groups = num_groups(self.config.width)
        nodes = [self.tree.add_child(root, subtree=place % groups) for place in range(self.config.width)]
        return [self._expand(root, nodes)]

    def on_step(self, node_id: int, token_ids: Sequence[int], text: str, finish: StepFinish) -> list[Action]:
        """A child has generated its step."""
        if self.is_over:
            return []
        node = self.tree.nodes[node_id]
        self.tree.set_step(node, token_ids, text, finish)
        actions: list[Action] = [Score(node_id)]
        if not self._waits_for_levels and not self._is_complete(node):
            node.state = "retained"
            node.allocation = 1
            actions.append(self._expand(node, [self.tree.add_child(node)]))
        return actions

    def on_scored(self, node_id: int, score: float, embedding: NDArray[np.float32] | None) -> list[Action]:
        """The PRM has read a step."""
        if self.is_over:
            return []
        node = self.tree.nodes[node_id]
        node.score, node.embedding = score, embedding
        return self._settled(node)

    def on_failed(self, node_id: int, reason: str) -> list[Action]:
        """A child died; the others go on without it."""
        if self.is_over:
            return []
        node = self.tree.nodes[node_id]
        node.state, node.reason = "failed", reason
        return self._settled(node)

    def level(self, kv: CostTree | None) -> Level:
        """The level that the last `Select` asked about; `kv` is the radix ledger's account of its leaves, in order.

        It has what the policy reads: costs if an integer program decides (else `kv` is None), embeddings if it covers.
        To be asked for once a level: its embeddings become part of the running center.
        """
        leaves = self._leaves
        steps = [len(leaf.token_ids) for leaf in leaves]
        return Level(
            scores=np.array([leaf.score for leaf in leaves], dtype=np.float64),
            kv=kv,
            nodes=self._node_costs(leaves) if self.config.is_solved and self.config.kv_cost == "nodes" else None,
            embeddings=self._embeddings(leaves) if self.config.algorithm == "ets" else None,
            subtree=np.array([leaf.subtree for leaf in leaves], dtype=np.int64),
            growth_tokens=self.remaining_width * sum(steps) / len(steps),
            remaining_width=self.remaining_width,
        )

    def on_selected(self, selection: Selection) -> list[Action]:
        """The policy has decided: prune what got nothing, expand the rest."""
        if self.is_over:
            return []
        if not selection.allocation.any():
            return self._finish("kv_budget")  # the leaves stay unpruned: they are what the search has
        clusters = selection.clusters
        pruned: list[int] = []
        expansions: list[Action] = []
        self._level = []
        for place, leaf in enumerate(self._leaves):
            self._forget_embedding(leaf)
            leaf.cluster = None if clusters is None else int(clusters[place])
            leaf.allocation = int(selection.allocation[place])
            if leaf.allocation == 0:
                leaf.state = "pruned"
                pruned.append(leaf.id)
                continue
            leaf.state = "retained"
            children = [self.tree.add_child(leaf) for _ in range(leaf.allocation)]
            expansions.append(self._expand(leaf, children))
        return [Prune(tuple(pruned)), *expansions] if pruned else expansions

    def stop(self, reason: str) -> list[Action]:
        """End now with what there is."""
        return [] if self.is_over else self._finish(reason)

    def trajectories(self) -> list[Trajectory]:
        """Complete trajectories by place; if there is none, the unfinished ones, marked "length"."""
        ends = self.tree.by_place(self.tree.complete() or self.tree.tips())
        return [
            Trajectory(
                end.id,
                self.tree.trajectory_token_ids(end),
                self.tree.trajectory_text(end),
                tuple(node.score for node in self.tree.path(end) if node.score is not None),
                "stop" if end.finish == "stop" else "length",
            )
            for end in ends
        ]

    def _expand(self, node: Node, children: list[Node]) -> Expand:
        self._level += children
        self._open |= dict.fromkeys(child.id for child in children)
        room = self.config.max_tokens - node.trajectory_tokens
        return Expand(node.id, tuple(child.id for child in children), min(self.config.max_step_tokens, room))

    def _is_complete(self, node: Node) -> bool:
        return (
            node.finish == "stop"
            or node.trajectory_tokens >= self.config.max_tokens
            or node.depth >= self.config.max_steps
        )

    def _settled(self, node: Node) -> list[Action]:
        """A node got its score or failed: is the level, or the search, complete?"""
        del self._open[node.id]
        if self._waits_for_levels:
            return [] if self._open else self._level_done()
        actions: list[Action] = self._measures()
        if node.state == "open":  # not expanded, so this step was its trajectory's last
            actions += self._complete(node)
        return actions + (self._finish_all() if not self._open else [])

    def _measures(self) -> list[Action]:
        """Depths of best-of-N that no open node can reach any more."""
        deepest = max(node.depth for node in self._level)
        reached = min((self.tree.nodes[node_id].depth for node_id in self._open), default=deepest + 1)
        actions: list[Action] = [Measure(depth) for depth in range(self._num_measured + 1, reached)]
        self._num_measured = max(self._num_measured, reached - 1)
        return actions

    def _level_done(self) -> list[Action]:
        scored = [node for node in self._level if node.state == "open"]
        actions: list[Action] = [Measure(self._level[0].depth)]
        for node in scored:
            if self._is_complete(node):
                actions += self._complete(node)
        self._leaves = [node for node in scored if node.state == "open"]
        if not self._leaves or self.remaining_width <= 0:
            return actions + self._finish_all()
        return [*actions, Select(tuple(leaf.id for leaf in self._leaves))]

    def _complete(self, node: Node) -> list[Action]:
        node.state = "complete"
        self._forget_embedding(node)
        self.remaining_width -= 1
        return [Complete(node.id)]

    def _finish_all(self) -> list[Action]:
        return self._finish("complete" if self.tree.complete() else "failed")

    def _finish(self, reason: str) -> list[Action]:
        self.is_over = True
        return [Finish(reason)]

    def _node_costs(self, leaves: Sequence[Node]) -> CostTree:
        """The search tree above the leaves, cost 1 a node, as published; numbered in order of creation."""
        return CostTree.from_paths([[(step.id, 1.0) for step in self.tree.path(leaf)] for leaf in leaves], by_key=True)

    def _embeddings(self, leaves: list[Node]) -> NDArray[np.float32] | None:
        """float32[L, H] as clusters want them; None if the PRM gave none for some leaf."""
        rows = [leaf.embedding for leaf in leaves if leaf.embedding is not None]
        if len(rows) < len(leaves):
            return None
        embeddings = np.stack(rows)
        return self._center.centered(embeddings) if self.config.center_embeddings else embeddings

    def _forget_embedding(self, node: Node) -> None:
        """An embedding is only needed until its level is selected, unless the client wants to see it."""
        if not self.config.return_embeddings:
            node.embedding = None
