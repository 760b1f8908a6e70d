"""A returned tree, read back and checked, and the KV that it means level by level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from sglang_ets.core.allocation import rebase_allocation
from sglang_ets.core.tree import State, StepFinish

STATES = get_args(State)
FINISHES = (*get_args(StepFinish), None)
SELECTING_NOTHING = "best_of_n"


@dataclass(frozen=True)
class ViewNode:
    """One step as `return_tree` gives it; the parent of a first step is 0."""

    id: int
    parent: int
    depth: int
    text: str
    token_ids: tuple[int, ...]
    finish: str | None
    score: float | None
    allocation: int
    cluster: int | None
    state: str
    reason: str


@dataclass(frozen=True)
class KvLevel:
    """Distinct KV tokens, prompt included, around the selection of one level. None: not known, or nothing was selected."""

    depth: int
    leaves: int  # trajectories of this length that were scored
    pruned: int
    generated_tokens: int
    held_tokens: int | None  # before the selection, from the tree
    retained_tokens: int | None  # after it
    rebase_tokens: int | None  # after it, had REBASE chosen among the same leaves
    measured_held_tokens: int | None  # what the server's radix cache counted
    measured_retained_tokens: int | None


def read_nodes(tree: Mapping[str, Any]) -> tuple[ViewNode, ...]:
    """Nodes in the order given, parents first.

    Raises:
        ValueError: the schema is broken; names the node, the rule and the value.
    """
    prompt_tokens, nodes = tree.get("prompt_tokens"), tree.get("nodes")
    if not _is_count(prompt_tokens):
        raise ValueError(
            f"prompt_tokens must be an integer of 0 or more, got {prompt_tokens!r}; save the tree unchanged"
        )
    if not isinstance(nodes, list) or not nodes:
        raise ValueError("nodes must be a list with at least one step; save the tree of a search that has begun")
    depths = {0: 0}
    read = []
    for place, plain in enumerate(nodes):
        node = _read_node(place, plain)
        if node.id in depths:
            _refuse(place, "id", "must be new", node.id)
        if node.parent not in depths:
            _refuse(place, "parent", "must be 0 or the id of an earlier node", node.parent)
        if node.depth != depths[node.parent] + 1:
            _refuse(place, "depth", "must be one more than its parent's", node.depth)
        depths[node.id] = node.depth
        read.append(node)
    return tuple(read)


def _read_node(place: int, plain: Any) -> ViewNode:
    if not isinstance(plain, dict):
        raise ValueError(f"nodes[{place}] must be an object, got {type(plain).__name__}; save the tree unchanged")
    for name in ("id", "parent", "depth"):
        if not _is_count(plain.get(name)):
            _refuse(place, name, "must be an integer of 0 or more", plain.get(name))
    text, token_ids, score = plain.get("text", ""), plain.get("token_ids", []), plain.get("score")
    if not isinstance(text, str):
        _refuse(place, "text", "must be text", text)
    if not isinstance(token_ids, list) or not all(_is_count(token) for token in token_ids):
        _refuse(place, "token_ids", "must be a list of token ids", token_ids)
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
    if score is not None and not is_number:
        _refuse(place, "score", "must be a finite number or null", score)
    if plain.get("state") not in STATES:
        _refuse(place, "state", f"must be one of {', '.join(STATES)}", plain.get("state"))
    if plain.get("finish") not in FINISHES:
        _refuse(place, "finish", "must be step, stop, length or null", plain.get("finish"))
    cluster, allocation = plain.get("cluster"), plain.get("allocation", 0)
    if cluster is not None and not _is_count(cluster):
        _refuse(place, "cluster", "must be an integer of 0 or more, or null", cluster)
    if not _is_count(allocation):
        _refuse(place, "allocation", "must be an integer of 0 or more", allocation)
    reason = str(plain.get("reason") or "")
    where = (plain["id"], plain["parent"], plain["depth"])
    return ViewNode(
        *where, text, tuple(token_ids), plain.get("finish"), score, allocation, cluster, plain["state"], reason
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse(place: int, name: str, rule: str, value: Any) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise ValueError(f"{name} of nodes[{place}] {rule}, got {shown}; save the tree as the server gave it")


def kv_levels(
    nodes: Sequence[ViewNode],
    prompt_tokens: int,
    algorithm: str | None,
    measured: Sequence[Mapping[str, Any]],
    rebase_temperature: float,
) -> tuple[KvLevel, ...]:
    """KV of each level, counted from the token ids as the radix cache counts it: a shared beginning counts once.

    The last token of a trajectory has no KV yet. On pages of one token this equals what the server measured, which with the
    overlap schedule may have that token, too; larger pages share less. A search that selects nothing has no levels that are
    complete at one time, so only what was measured is given.
    """
    given = {level.get("depth"): level for level in measured if isinstance(level, dict)}
    trie = _Trie(nodes)
    width = sum(node.depth == 1 for node in nodes)
    levels = []
    for depth in range(1, max(node.depth for node in nodes) + 1):
        made = [node for node in nodes if node.depth == depth]
        scored = [node for node in made if node.state != "failed" and node.finish is not None]
        width -= sum(node.state == "complete" for node in made)
        leaves = [node for node in scored if node.state in ("retained", "pruned")]
        kept = [node for node in leaves if node.state == "retained"]
        is_known = algorithm != SELECTING_NOTHING and bool(trie)
        is_selected = is_known and bool(kept)
        rebase = _rebase_keeps(leaves, width, rebase_temperature) if is_selected else None
        levels.append(
            KvLevel(
                depth,
                len(scored),
                sum(node.state == "pruned" for node in made),
                sum(len(node.token_ids) for node in made),
                prompt_tokens + trie.count(scored) if is_known else None,
                prompt_tokens + trie.count(kept) if is_selected else None,
                prompt_tokens + trie.count(rebase) if rebase is not None else None,
                _measured(given.get(depth), "held"),
                _measured(given.get(depth), "retained"),
            )
        )
    return tuple(levels)


def _rebase_keeps(leaves: Sequence[ViewNode], width: int, temperature: float) -> list[ViewNode] | None:
    """The leaves to which REBASE would give a share of the remaining width. None if a score is missing."""
    scores = [leaf.score for leaf in leaves if leaf.score is not None]
    if len(scores) != len(leaves) or width < 1:
        return None
    shares = rebase_allocation(np.array(scores, dtype=np.float64), width, temperature)
    return [leaf for leaf, share in zip(leaves, shares.tolist(), strict=True) if share > 0]


def _measured(level: Mapping[str, Any] | None, name: str) -> int | None:
    value = level.get(name) if level is not None else None
    return value if _is_count(value) else None


class _Trie:
    """All trajectories of a tree by token: for each node, the ids of the distinct KV positions that its path holds."""

    def __init__(self, nodes: Iterable[ViewNode]) -> None:
        self._parent: list[int] = [0]  # of each position; position 0 is the prompt
        places: dict[tuple[int, int], int] = {}
        self._end: dict[int, int] = {0: 0}
        for node in nodes:
            at = self._end[node.parent]
            for token in node.token_ids:
                place = places.setdefault((at, token), len(self._parent))
                if place == len(self._parent):
                    self._parent.append(at)
                at = place
            self._end[node.id] = at

    def __bool__(self) -> bool:
        """Whether the tree brought any token ids."""
        return len(self._parent) > 1

    def count(self, ends: Iterable[ViewNode]) -> int:
        """Distinct positions on the paths to `ends`, without the last token of each path."""
        seen: set[int] = set()
        for node in ends:
            at = self._parent[self._end[node.id]]
            while at and at not in seen:
                seen.add(at)
                at = self._parent[at]
        return len(seen)
