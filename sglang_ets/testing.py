"""For whoever writes a selection policy: its decisions on recorded trees, without a server.

    from sglang_ets.testing import replay

    for decision in replay(TopK(keep=2), ["tree.json"]):
        print(decision.level.depth, decision.selection.allocation, decision.kv_kept)

A tree is what `return_tree` brings (`sglang-ets ask "7*8=" --tree tree.json` saves one, `sglang-ets run` a file of them); with
`return_embeddings` its levels have embeddings. Every level that was selected from is shown to the policy as the server would
show it. Its children are those that were recorded, whatever the policy decides: a level is a question, not a game. A policy
that reads pruned leaves sees those that the record has pruned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sglang_ets.core.allocation import best_places
from sglang_ets.core.clusters import RunningCenter
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import CostTree
from sglang_ets.core.kv_costs import token_costs
from sglang_ets.core.registry import num_pruned_shown
from sglang_ets.core.selection import Level, Selection, SelectionPolicy, checked

Tree = Mapping[str, Any]
Node = TypeVar("Node", bound=Mapping[str, Any])  # as it stands in `nodes` of a tree


@dataclass(frozen=True, eq=False)
class Decision:
    """What a policy made of one recorded level."""

    tree: int  # which tree, in the order given
    level: Level
    leaf_ids: tuple[int, ...]  # node ids in the recorded tree
    selection: Selection
    kv_kept: float  # share of the level's KV tokens that the kept leaves hold, 0..1


def replay(
    policy: SelectionPolicy, trees: Iterable[Tree | Path | str], config: SearchConfig | None = None
) -> Iterator[Decision]:
    """The policy's decision on each level of each tree, in order.

    `trees` are returned trees, answers that hold one, or JSON and JSONL files of these. `config` is passed to the policy; its
    default has the width of the tree.

    Raises:
        ValueError: a decision does not share out the remaining width, or differs when it is asked for again; or a tree
            cannot be read.
    """
    for number, tree in enumerate(one for given in trees for one in trees_in(given)):
        own = config or SearchConfig(width=max(2, _width_of(tree["nodes"])))
        name, most = type(policy).__name__, num_pruned_shown(policy, own.width)
        for level, leaf_ids in levels_of(
            tree["nodes"], center=own.center_embeddings, seed=own.seed, num_pruned=most, max_steps=own.max_steps
        ):
            selection, again = (checked(policy.select(level, own), level, name) for _ in range(2))
            if selection.allocation.tolist() != again.allocation.tolist():
                raise ValueError(
                    f"{name} must decide equal levels equally, got {selection.allocation} and {again.allocation} at depth "
                    f"{level.depth}; take chance from level.rng()"
                )
            assert level.kv is not None
            yield Decision(number, level, leaf_ids, selection, level.kv.share_held(selection.allocation > 0))


def trees_in(given: Tree | Path | str) -> Iterator[Tree]:
    """The trees of a file, or the one that is given, wherever it stands in an answer.

    Raises:
        ValueError: there is no tree.
    """
    if isinstance(given, (str, Path)):
        path = Path(given)
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else [text]
        for line in lines:
            yield from trees_in(json.loads(line))
        return
    tree: Any = given
    for keys in (("metadata", "search", "tree"), ("search", "tree"), ("tree",)):
        at: Any = given
        for key in keys:
            at = at.get(key) if isinstance(at, Mapping) else None
        tree = at if isinstance(at, Mapping) else tree
    if "nodes" not in tree:
        raise ValueError(f"a recorded tree must have nodes, got {', '.join(map(str, given))}; ask with return_tree")
    yield tree


def levels_of(
    nodes: Sequence[Mapping[str, Any]],
    *,
    center: bool = True,
    seed: int = 0,
    num_pruned: int = 0,
    max_steps: int = SearchConfig.max_steps,
) -> Iterator[tuple[Level, tuple[int, ...]]]:
    """Each level of a recorded tree that was selected from, with the ids of its leaves.

    With `num_pruned`, the best so many of the leaves pruned before stand after its own, as in a search of `max_steps`.
    """
    by_id = {node["id"]: node for node in nodes}
    selected = _selected_in(nodes)
    running = RunningCenter()
    pruned: list[Mapping[str, Any]] = []
    for number in sorted(set(map(_level, nodes))):
        own = [n for n in nodes if _level(n) == number and n["state"] in ("retained", "pruned")]
        width = sum(by_id[node_id]["allocation"] for node_id, at in selected.items() if at == number)
        leaves = own + pruned
        if not width or not leaves:
            continue
        pruned = _revivable(leaves, selected, number, num_pruned if number < max_steps else 0)
        paths = [path_to(leaf, by_id) for leaf in leaves]
        embeddings = None
        if all(leaf.get("embedding") is not None for leaf in leaves):
            embeddings = np.array([leaf["embedding"] for leaf in leaves], dtype=np.float32)
            embeddings = running.centered(embeddings) if center else embeddings
        firsts = {first: group for group, first in enumerate(sorted({path[0]["id"] for path in paths}))}
        steps = [len(leaf["token_ids"]) for leaf in leaves]
        level = Level(
            scores=np.array([leaf["score"] for leaf in leaves], dtype=np.float64),
            kv=token_costs([[token for step in path for token in step["token_ids"]] for path in paths]),
            nodes=CostTree.from_paths([[(step["id"], 1.0) for step in path] for path in paths], by_key=True),
            embeddings=embeddings,
            subtree=np.array([firsts[path[0]["id"]] for path in paths], dtype=np.int64),
            growth_tokens=width * sum(steps) / len(steps),
            remaining_width=width,
            depth=max(map(len, paths)),
            seed=seed,
            texts=tuple(leaf["text"] for leaf in leaves),
            path_scores=tuple(tuple(step["score"] for step in path) for path in paths),
            parents=np.array([leaf["parent"] for leaf in leaves], dtype=np.int64),
            number=number,
            is_pruned=np.arange(len(leaves)) >= len(own) if num_pruned else None,
        )
        yield level, tuple(leaf["id"] for leaf in leaves)


def _level(node: Mapping[str, Any]) -> int:
    """In which a step was sampled."""
    return int(node.get("level", node["depth"]))


def _selected_in(nodes: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Node id -> the level whose selection let it go on: its own, or a later one that revived it."""
    below = {node["parent"]: _level(node) - 1 for node in nodes}
    return {node["id"]: below.get(node["id"], _level(node)) for node in nodes if node["state"] == "retained"}


def _revivable(
    leaves: Sequence[Mapping[str, Any]], selected: Mapping[int, int], number: int, most: int
) -> list[Mapping[str, Any]]:
    """The best of the leaves that did not go on at this level, by depth and place as in the record."""
    left = sorted((leaf for leaf in leaves if selected.get(leaf["id"]) != number), key=lambda leaf: leaf["id"])
    return [left[at] for at in best_places(np.array([leaf["score"] for leaf in left], dtype=np.float64), most).tolist()]


def path_to(leaf: Node, by_id: Mapping[int, Node]) -> list[Node]:
    """The nodes from the first step to this one; the prompt is not among them."""
    path = [leaf]
    while path[-1]["parent"] in by_id:
        path.append(by_id[path[-1]["parent"]])
    return path[::-1]


def _width_of(nodes: Sequence[Mapping[str, Any]]) -> int:
    """Of the first level, which has a step for each trajectory."""
    return sum(node["depth"] == 1 for node in nodes)
