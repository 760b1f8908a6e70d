"""The search tree: what is derived from it, and each invariant that `check` holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ets.core.tree import Node, SearchTree, TreeBroken

PROMPT_TOKENS = 5


def small_tree() -> tuple[SearchTree, list[Node]]:
    """Root -> a (retained) -> {b complete, c open and scored, d pruned}; root -> e pruned; root -> f failed."""
    tree = SearchTree(PROMPT_TOKENS)
    a, e, f = (tree.add_child(tree.root, subtree=group) for group in range(3))
    tree.set_step(a, [1, 2], "A ", "step")
    tree.set_step(e, [3], "E ", "step")
    a.state, e.state, f.state, f.reason = "retained", "pruned", "failed", "aborted"
    b, c, d = (tree.add_child(a) for _ in range(3))
    tree.set_step(b, [4, 5, 6], "B", "stop")
    tree.set_step(c, [7], "C ", "step")
    tree.set_step(d, [8], "D ", "step")
    a.score, b.score, c.score, d.score = 0.5, 0.9, 0.4, 0.1
    b.state, d.state = "complete", "pruned"
    tree.check()
    return tree, [a, b, c, d, e, f]


def test_ids_are_places_and_children_keep_their_group() -> None:
    tree, (a, b, c, d, e, f) = small_tree()
    assert [node.id for node in tree.nodes] == list(range(7))
    assert [node.depth for node in (tree.root, a, b, e)] == [0, 1, 2, 1]
    assert [node.subtree for node in (a, e, f, b, c, d)] == [0, 1, 2, 0, 0, 0]


def test_a_trajectory_is_what_stands_on_its_path() -> None:
    tree, (a, b, _, _, _, _) = small_tree()
    assert tree.path(b) == [a, b]
    assert tree.path(tree.root) == []
    assert tree.trajectory_token_ids(b) == (1, 2, 4, 5, 6)
    assert tree.trajectory_text(b) == "A B"
    assert (a.trajectory_tokens, b.trajectory_tokens, tree.root.trajectory_tokens) == (2, 5, 0)


def test_views_by_state() -> None:
    tree, (_, b, c, _, _, _) = small_tree()
    assert tree.complete() == [b]
    assert tree.tips() == [c]


def test_a_retained_node_is_a_tip_until_a_child_has_a_step() -> None:
    tree, (a, b, c, d, _, _) = small_tree()
    c.state = "retained"
    child = tree.add_child(c)
    assert tree.tips() == [c], "a child without a step ends nothing"
    tree.set_step(child, [9], "x", "length")
    assert tree.tips() == [child]
    child.state = c.state = b.state = d.state = "pruned"
    assert tree.tips() == [a], "what selection gave up leaves its parent"


def test_a_node_gets_one_step() -> None:
    tree, (_, b, c, _, _, f) = small_tree()
    for node in (tree.root, b, c, f):
        with pytest.raises(TreeBroken, match=f"node {node.id} got a second step"):
            tree.set_step(node, [1], "again", "step")


def test_check_names_both_sides_of_what_is_broken() -> None:
    tree, (a, b, c, _, _, _) = small_tree()
    for state in ("pruned", "complete", "open"):
        a.state = state  # type: ignore[assignment]
        with pytest.raises(TreeBroken, match=f"node {b.id} hangs under node {a.id}, which is {state}"):
            tree.check()
    a.state = "retained"
    b.trajectory_tokens = 4
    with pytest.raises(TreeBroken, match=f"node {b.id} counts 4 tokens; expected 5"):
        tree.check()
    b.trajectory_tokens = 5
    c.parent = c
    with pytest.raises(TreeBroken, match=f"node {c.id} has parent {c.id}; expected a smaller id"):
        tree.check()
    c.parent = a
    tree.nodes[1:3] = tree.nodes[2:0:-1]
    with pytest.raises(TreeBroken, match="node at place 1 has id 2; expected 1"):
        tree.check()


def test_a_place_is_the_same_whatever_was_made_first() -> None:
    def grown(order: list[int]) -> SearchTree:
        """Three children of the root, of which the ones in `order` go on by a step each."""
        tree = SearchTree(PROMPT_TOKENS)
        above = [tree.add_child(tree.root) for _ in range(3)]
        for at in order:
            tree.set_step(above[at], [at], f"{at} ", "step")
            above[at].state = "retained"
            tree.set_step(tree.add_child(above[at]), [at, at], f"{at}{at}", "stop")
        tree.check()
        return tree

    first, second = grown([0, 1, 2]), grown([2, 0, 1])
    assert [first.place(node) for node in first.nodes] == [(), (0,), (1,), (2,), (0, 0), (1, 0), (2, 0)]
    assert [second.place(node) for node in second.nodes[4:]] == [(2, 0), (0, 0), (1, 0)]
    assert [node.text for node in second.by_place(second.nodes[4:])] == ["00", "11", "22"]
    assert first.to_dict() == second.to_dict()


def test_plain_data_has_every_node_but_the_root() -> None:
    tree, (a, b, c, _, _, f) = small_tree()
    c.embedding = np.array([0.123456789, 1.0], dtype=np.float32)
    a.allocation, a.cluster = 3, 1
    plain = tree.to_dict()
    assert plain["prompt_tokens"] == PROMPT_TOKENS
    assert [node["id"] for node in plain["nodes"]] == [1, 2, 3, 4, 5, 6]
    assert all("embedding" not in node for node in plain["nodes"])
    assert plain["nodes"][a.id - 1] == {
        "id": a.id,
        "parent": 0,
        "depth": 1,
        "text": "A ",
        "token_ids": [1, 2],
        "finish": "step",
        "score": 0.5,
        "allocation": 3,
        "cluster": 1,
        "state": "retained",
        "reason": "",
    }
    assert plain["nodes"][f.id - 1]["reason"] == "aborted"
    embeddings = [node["embedding"] for node in tree.to_dict(with_embeddings=True)["nodes"]]
    assert embeddings[c.id - 1] == pytest.approx([0.123457, 1.0], abs=1e-6)
    assert embeddings[b.id - 1] is None


@given(steps=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 4)), min_size=1, max_size=40))
def test_counts_of_any_tree_follow_its_paths(steps: list[tuple[int, int]]) -> None:
    tree = SearchTree(PROMPT_TOKENS)
    for place, (parent, length) in enumerate(steps):
        above = tree.nodes[parent % len(tree.nodes)]
        above.state = "retained"
        node = tree.add_child(above)
        tree.set_step(node, range(length), f"{place};", "step")
    tree.check()
    for node in tree.nodes:
        path = tree.path(node)
        assert len(path) == node.depth
        assert node.trajectory_tokens == len(tree.trajectory_token_ids(node)) == sum(len(n.token_ids) for n in path)
        assert tree.trajectory_text(node) == "".join(n.text for n in path)
    parents = {node.parent.id for node in tree.nodes if node.parent is not None}
    assert [tip.id for tip in tree.tips()] == [node.id for node in tree.nodes if node.id not in parents]
