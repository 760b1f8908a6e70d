"""One search's state machine: expand, score, select, prune, until no width is left. Knows no engine.

Events come in through the `on_*` methods, actions go out as their results. Deterministic: equal events in equal order give
equal actions. All policies wait for a level to be complete, except best-of-N, whose trajectories never meet.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.allocation import best_places
from sglang_ets.core.answer import Trajectory, aggregate
from sglang_ets.core.clusters import Distances, RunningCenter, cosine_distances
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import CostTree
from sglang_ets.core.patterns import extract_answer
from sglang_ets.core.selection import Level, Selection, num_groups
from sglang_ets.core.speculation import (
    KNOWN_SHARE,
    KNOWN_SHARE_OF_CLUSTERS,
    SCORED_PARTS,
    Forecast,
    Guess,
    known_width,
)
from sglang_ets.core.stopping import MAX_SCORE, MIN_SCORE, Ballot, EarlyEnd, EarlyReason, early_reason, highest_score
from sglang_ets.core.token_budget import TokenBudget
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

    level: int  # its number, which is the depth of its steps unless a leaf was revived


@dataclass(frozen=True)
class Select:
    """Choose among these leaves: `level`, then the policy, then `on_selected`."""

    leaf_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prune:
    """These nodes go no further, unless they are revived; what only they hold is free."""

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

    def __init__(self, config: SearchConfig, prompt_tokens: int, distances: Distances = cosine_distances) -> None:
        self.config = config
        self.tree = SearchTree(prompt_tokens)
        self.remaining_width = config.width
        self.is_over = False
        self.early_end: EarlyEnd | None = None  # what ended it before its last trajectory
        self.num_given_up = 0  # trajectories that the token budget did not let grow to their end
        self.num_revived = 0  # pruned leaves that went on after all
        self.revivable: list[Node] = []  # pruned leaves that may yet go on, by place
        self._open: dict[int, None] = {}  # nodes without a score yet, in order of creation
        self._level: list[Node] = []  # nodes of the level that is being made
        self._leaves: list[Node] = []  # what `Select` asked about
        self._num_levels = 0  # that are complete
        self._num_open = Counter[int]()  # nodes without a score yet, by depth
        self._deepest = 0
        self._num_measured = 0
        self._distances = distances
        self._center = RunningCenter()
        self._ended: list[Node] = []  # last nodes of complete trajectories, in order of completion
        self._votes: list[tuple[float, str | None]] = []  # of the first of these: score and answer
        self._promises: dict[int, float] = {}  # by node
        self._budget = TokenBudget(config)

    @property
    def _waits_for_levels(self) -> bool:
        return self.config.algorithm != "best_of_n"

    @property
    def speculates(self) -> bool:
        """Whether `guesses` may give any.

        With a budget it does not: what is computed and not used would go beyond it. Nor where pruned leaves come back: what is
        known of a part of a level says nothing of what they will be chosen against.
        """
        config = self.config
        has_budget = config.max_total_tokens is not None or config.kv_budget_tokens is not None
        return config.speculate and self._waits_for_levels and not has_budget and not config.num_pruned_shown

    def start(self) -> list[Action]:
        """The first level: `width` steps from the prompt, or what the token budget allows. DVTS deals them out to subtrees."""
        root = self.tree.root
        self._narrow(self._budget.width_at_start)
        groups = num_groups(self.remaining_width)
        nodes = [self.tree.add_child(root, subtree=place % groups) for place in range(self.remaining_width)]
        return [self._expand(root, nodes)]

    def on_step(self, node_id: int, token_ids: Sequence[int], text: str, finish: StepFinish) -> list[Action]:
        """A child has generated its step."""
        if self.is_over:
            return []
        node = self.tree.nodes[node_id]
        self.tree.set_step(node, token_ids, text, finish)
        self._budget.spent_tokens += len(node.token_ids)
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
        return self._node_done(node)

    def on_failed(self, node_id: int, reason: str) -> list[Action]:
        """A child died; the others go on without it."""
        if self.is_over:
            return []
        node = self.tree.nodes[node_id]
        node.state, node.reason = "failed", reason
        return self._node_done(node)

    def level(self, kv: CostTree | None) -> Level:
        """The level that the last `Select` asked about; `kv` is what its leaves cost, in order.

        It has what the policy reads; without costs `kv` is None.
        To be asked for once a level: its embeddings become part of the running center.
        """
        embeddings = self._embeddings(self._leaves, self._center) if self.config.reads_embeddings else None
        return self._level_of(self._leaves, self.remaining_width, kv, embeddings)

    def scored_leaves(self) -> list[Node]:
        """Leaves that have their scores, while steps of their level still run; none before enough of it is scored."""
        if self.is_over or not self._num_unfinished or not self._is_known_with(0):
            return []
        return [node for node in self._level if node.score is not None and not self._has_completed(node)]

    def wants_scores(self, num_waiting: int) -> bool:
        """Whether so many of its steps should be scored now, though others still run: it may then go on from them."""
        is_part = SCORED_PARTS * num_waiting >= len(self._level)
        return self.speculates and is_part and self._is_known_with(num_waiting)

    def _is_known_with(self, num_more: int) -> bool:
        """Whether enough of the level has scores, or will have them with so many more."""
        num_scored = sum(node.score is not None for node in self._level)
        share = KNOWN_SHARE_OF_CLUSTERS if self.config.reads_embeddings else KNOWN_SHARE
        return num_scored + num_more >= share * len(self._level)

    def partial_level(self, leaves: Sequence[Node]) -> Level:
        """These scored leaves as a level of their own, with their share of the width, and without costs in tokens.

        Changes nothing, so it may be asked for at any time.
        """
        num_ended = sum(self._has_completed(node) for node in self._level)
        num_growing = sum(node.state == "open" and not self._has_completed(node) for node in self._level)
        width = known_width(self.remaining_width - num_ended, len(leaves), num_growing)
        center = copy.copy(self._center)
        embeddings = self._embeddings(leaves, center) if self.config.reads_embeddings else None
        return self._level_of(leaves, width, None, embeddings)

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
            was_pruned = leaf.state == "pruned"
            if leaf.allocation == 0:
                leaf.state = "pruned"
                pruned += [] if was_pruned else [leaf.id]
                continue
            leaf.state = "retained"
            self.num_revived += was_pruned
            children = [self.tree.add_child(leaf, level=self._num_levels + 1) for _ in range(leaf.allocation)]
            expansions.append(self._expand(leaf, children))
        self._keep_revivable()
        return [Prune(tuple(pruned)), *expansions] if pruned else expansions

    def _keep_revivable(self) -> None:
        """The best of what did not go on may yet do so, until there were as many levels as a trajectory may have steps.

        So a search has fewer than twice as many levels.
        """
        most = self.config.num_pruned_shown if self._num_levels < self.config.max_steps else 0
        pruned = self.tree.by_place(leaf for leaf in self._leaves if leaf.state == "pruned") if most else []
        scores = np.array([leaf.score for leaf in pruned], dtype=np.float64)
        self.revivable = [pruned[place] for place in best_places(scores, most).tolist()]

    def is_last_step(self, node_id: int, num_tokens: int, finish: StepFinish) -> bool:
        """Whether a step of this length, not in the tree yet, is the last one of its trajectory, whatever its score.

        Raises:
            ValueError: the root was asked about, which is no step.
        """
        node = self.tree.nodes[node_id]
        if node.parent is None:
            raise ValueError("the root of a search tree is no step")
        return self._ends(node.depth, node.parent.trajectory_tokens + num_tokens, finish)

    def guesses(self, expected: Forecast, num_begun: Mapping[int, int], num_running: int, most: int) -> list[Guess]:
        """At most so many children of scored leaves that may begin while the longest steps of the level still run.

        Changes nothing: what begins becomes a node only if `on_selected` expands its leaf so far. `num_begun` says how many
        children of a leaf have begun so, `num_running` how many of all these have not ended: with the level's own steps
        they are never more than the level has nodes.
        """
        if not self.speculates or self.is_over or not self._num_unfinished:
            return []
        most = min(most, len(self._level) - self._num_unfinished - num_running)
        made: list[Guess] = []
        for leaf_id, count in expected:
            first = num_begun.get(leaf_id, 0)
            count = min(count - first, most)
            if count > 0:
                made.append(Guess(leaf_id, first, count, self._room(self.tree.nodes[leaf_id])))
                most -= count
        return made

    @property
    def _num_unfinished(self) -> int:
        return sum(node.finish is None and node.state == "open" for node in self._level)

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
                self._step_scores(end),
                "stop" if end.finish == "stop" else "length",
            )
            for end in ends
        ]

    def _expand(self, node: Node, children: list[Node]) -> Expand:
        self._level += children
        self._open |= dict.fromkeys(child.id for child in children)
        self._num_open[node.depth + 1] += len(children)
        self._deepest = max(self._deepest, node.depth + 1)
        room = self._room(node)
        if self._waits_for_levels:
            room = min(room, self._budget.share(self.remaining_width))
        return Expand(node.id, tuple(child.id for child in children), room)

    def _room(self, node: Node) -> int:
        """Tokens that a step after this node may have, a token budget aside."""
        return min(self._most_tokens - node.trajectory_tokens, self.config.max_step_tokens)

    @property
    def _most_tokens(self) -> int:
        """Length of one trajectory at most. Those of best-of-N never meet, so each has its own share of a token budget."""
        return self.config.max_tokens if self._waits_for_levels else self._budget.longest_trajectory

    def _has_completed(self, node: Node) -> bool:
        """Whether its step, which has ended, is its trajectory's last one."""
        return node.finish is not None and self._is_complete(node)

    def _is_complete(self, node: Node) -> bool:
        return self._ends(node.depth, node.trajectory_tokens, node.finish)

    def _ends(self, depth: int, trajectory_tokens: int, finish: StepFinish | None) -> bool:
        return finish == "stop" or trajectory_tokens >= self._most_tokens or depth >= self.config.max_steps

    def _node_done(self, node: Node) -> list[Action]:
        """A node got its score or failed: is the level, or the search, complete?"""
        del self._open[node.id]
        self._num_open[node.depth] -= 1
        if self._waits_for_levels:
            return [] if self._open else self._level_done()
        actions: list[Action] = self._measures()
        if node.state == "open":  # not expanded, so this step was its trajectory's last
            actions += self._complete(node)
        if not self._open:
            return actions + self._finish_all()
        return actions + self._end_early([self.tree.nodes[node_id] for node_id in self._open])

    def _measures(self) -> list[Action]:
        """Depths of best-of-N that no open node can reach any more."""
        first = self._num_measured + 1
        while self._num_measured < self._deepest and not self._num_open[self._num_measured + 1]:
            self._num_measured += 1
        return [Measure(depth) for depth in range(first, self._num_measured + 1)]

    def _level_done(self) -> list[Action]:
        scored = [node for node in self._level if node.state == "open"]
        self._num_levels += 1
        actions: list[Action] = [Measure(self._num_levels)]
        for node in scored:
            if self._is_complete(node):
                actions += self._complete(node)
        self._leaves = [node for node in scored if node.state == "open"]
        if self.config.num_pruned_shown:
            self._leaves = [*self.tree.by_place(self._leaves), *self.revivable]
        if not self._leaves or self.remaining_width <= 0:
            return actions + self._finish_all()
        ended = self._end_early(self._leaves) or self._fit_budget()
        if ended:
            return actions + ended
        return [*actions, Select(tuple(leaf.id for leaf in self._leaves))]

    def _complete(self, node: Node) -> list[Action]:
        node.state = "complete"
        self._ended.append(node)
        self._forget_embedding(node)
        self.remaining_width -= 1
        return [Complete(node.id)]

    def _end_early(self, growing: Sequence[Node]) -> list[Action]:
        """End if no trajectory that still grows can, or is likely to, change the answer; else nothing."""
        reason = self._early_reason(growing)
        if reason is None:
            return []
        complete, width = self.tree.complete(), self.remaining_width
        tokens, levels = (
            sum(values) / len(complete) - sum(others) / len(growing)
            for values, others in (
                ([n.trajectory_tokens for n in complete], [n.trajectory_tokens for n in growing]),
                ([n.depth for n in complete], [n.depth for n in growing]),
            )
        )
        a_step = sum(n.trajectory_tokens for n in complete) / sum(n.depth for n in complete)
        self.early_end = EarlyEnd(reason, width, max(1, round(levels)), round(width * max(tokens, a_step)))
        return self._finish(reason)

    def _early_reason(self, growing: Sequence[Node]) -> EarlyReason | None:
        config = self.config
        if config.early_stop == "off" or config.has_own_pattern or not self._ended:
            return None
        rule = config.score_aggregation
        for node in self._ended[len(self._votes) :]:
            answer = extract_answer(self.tree.trajectory_text(node), config.answer_pattern)
            self._votes.append((aggregate(self._step_scores(node), rule), answer))
        scores, answers = zip(*self._votes, strict=True)
        promise = max(map(self._promise, growing)) if config.early_stop == "likely" else MIN_SCORE
        return early_reason(config, Ballot(scores, answers, self.remaining_width, self._ceiling(growing), promise))

    def _promise(self, node: Node) -> float:
        """The score that a trajectory which ended here would have. Kept: of best-of-N it is asked for again and again."""
        if node.id not in self._promises:
            self._promises[node.id] = aggregate(self._step_scores(node), self.config.score_aggregation)
        return self._promises[node.id]

    def _ceiling(self, growing: Sequence[Node]) -> float:
        """The greatest score that one of the trajectories which still grow can have."""
        config, ceiling = self.config, MIN_SCORE
        for node in growing:
            score = highest_score(self._step_scores(node), config.score_aggregation, config.max_steps)
            ceiling = max(ceiling, score)
            if ceiling >= MAX_SCORE:
                break
        return ceiling

    def _step_scores(self, node: Node) -> tuple[float, ...]:
        return tuple(step.score for step in self.tree.path(node) if step.score is not None)

    def _fit_budget(self) -> list[Action]:
        """Narrow to the trajectories that the token budget can still finish; end if it holds no token for each of these."""
        affordable = self._budget.affordable(self._leaves, self.tree.complete())
        self._narrow(affordable)
        if affordable:
            return []
        return self._finish("max_total_tokens")

    def _narrow(self, width: int) -> None:
        self.num_given_up += max(0, self.remaining_width - width)
        self.remaining_width = min(self.remaining_width, width)

    def _finish_all(self) -> list[Action]:
        return self._finish("complete" if self.tree.complete() else "failed")

    def _finish(self, reason: str) -> list[Action]:
        self.is_over = True
        return [Finish(reason)]

    def _node_costs(self, leaves: Sequence[Node]) -> CostTree:
        """The search tree above the leaves, cost 1 a node, as published; numbered in order of creation."""
        return CostTree.from_paths([[(step.id, 1.0) for step in self.tree.path(leaf)] for leaf in leaves], by_key=True)

    def _level_of(
        self, leaves: Sequence[Node], width: int, kv: CostTree | None, embeddings: NDArray[np.float32] | None
    ) -> Level:
        steps = [len(leaf.token_ids) for leaf in leaves]
        revives = self.config.num_pruned_shown > 0
        return Level(
            scores=np.array([leaf.score for leaf in leaves], dtype=np.float64),
            kv=kv,
            nodes=self._node_costs(leaves) if self.config.reads_costs and self.config.kv_cost == "nodes" else None,
            embeddings=embeddings,
            subtree=np.array([leaf.subtree for leaf in leaves], dtype=np.int64),
            growth_tokens=width * sum(steps) / len(steps),
            remaining_width=width,
            depth=max(leaf.depth for leaf in leaves),
            seed=self.config.seed,
            texts=tuple(leaf.text for leaf in leaves),
            path_scores=tuple(self._step_scores(leaf) for leaf in leaves),
            parents=np.array([leaf.parent.id for leaf in leaves if leaf.parent is not None], dtype=np.int64),
            distances=self._distances,
            number=self._num_levels if revives else None,
            is_pruned=np.array([leaf.state == "pruned" for leaf in leaves], dtype=np.bool_) if revives else None,
        )

    def _embeddings(self, leaves: Sequence[Node], center: RunningCenter) -> NDArray[np.float32] | None:
        """float32[L, H] as clusters want them; None if the PRM gave none for some leaf."""
        rows = [leaf.embedding for leaf in leaves if leaf.embedding is not None]
        if len(rows) < len(leaves):
            return None
        embeddings = np.stack(rows)
        return center.centered(embeddings) if self.config.center_embeddings else embeddings

    def _forget_embedding(self, node: Node) -> None:
        """An embedding is only needed until its level is selected, unless the client wants to see it."""
        if not self.config.return_embeddings:
            node.embedding = None
