"""Trees of real searches (`return_tree`): grown by a server, and their paths as the integer program sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from tqdm import tqdm

from bench.embedded import client_of
from bench.server import running_server
from sglang_ets.core.ilp import CostTree

IN_FLIGHT = 2
GROWTH = ("id", "parent", "token_ids", "state", "allocation", "cluster")

Node = dict[str, Any]  # as it stands in `tree.nodes` of an answer


def grow(client: openai.OpenAI, prompt: str, width: int, search: Mapping[str, Any], **fields: Any) -> list[Node]:
    """The nodes of one search."""
    extra = {"search_width": width, "search": {**search, "return_tree": True}}
    answer = client.completions.create(model="default", prompt=prompt, extra_body=extra, **fields)
    return list(answer.search["tree"]["nodes"])  # type: ignore[attr-defined]


def rebase_trees(prompts: Sequence[str], width: int, **fields: Any) -> Iterator[list[Node]]:
    """The nodes of one search a prompt, with embeddings, from a server of its own; `fields` are of the requests."""
    asked = {"algorithm": "rebase", "return_embeddings": True}
    with running_server(["--search", "rebase"]) as url, ThreadPoolExecutor(IN_FLIGHT) as pool:
        client = client_of(url, timeout_s=1800)
        trees = pool.map(lambda prompt: grow(client, prompt, width, asked, **fields), prompts)
        yield from tqdm(trees, total=len(prompts), unit="tree")


def path_to(leaf: Node, by_id: Mapping[int, Node]) -> list[Node]:
    """The nodes from the first step to this one; the prompt is not among them."""
    path = [leaf]
    while path[-1]["parent"] in by_id:
        path.append(by_id[path[-1]["parent"]])
    return path[::-1]


def growth(nodes: Sequence[Node]) -> list[tuple[Any, ...]]:
    """Every node by its place, with its tokens and what became of it: equal for searches that went the same way."""
    return [tuple(node[key] for key in GROWTH) for node in nodes]


def num_distinct_prefixes(nodes: Sequence[Node]) -> int:
    """Distinct token prefixes of the trajectories, the prompt aside: what any engine must compute, or find computed."""
    by_id = {node["id"]: node for node in nodes}
    prefixes: set[tuple[int, ...]] = set()
    for node in nodes:
        token_ids = tuple(token for step in path_to(node, by_id) for token in step["token_ids"])
        before = len(token_ids) - len(node["token_ids"])
        prefixes |= {token_ids[:end] for end in range(before + 1, len(token_ids) + 1)}
    return len(prefixes)


def kv_tree(paths: Sequence[Sequence[Node]]) -> CostTree:
    """The cost of paths in a trie of their tokens, as the radix cache keeps them."""
    return CostTree.from_paths(
        [[(tuple(node["token_ids"]), float(len(node["token_ids"]))) for node in path] for path in paths]
    )
