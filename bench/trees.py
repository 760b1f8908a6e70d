"""Trees of real searches (`return_tree`): grown by a server, and their paths as the integer program sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from tqdm import tqdm

from bench.embedded import client_of
from bench.server import running_server
from sglang_ets.testing import path_to

IN_FLIGHT = 2
GROWTH = ("id", "parent", "token_ids", "state", "allocation", "cluster")

Node = dict[str, Any]  # as it stands in `tree.nodes` of an answer


def grow(
    client: openai.OpenAI, prompt: str, width: int, settings: Mapping[str, Any], *, is_chat: bool = False, **fields: Any
) -> Any:
    """The answer to one search, with its tree; `fields` are of the request."""
    extra = {"search_width": width, "search": {**settings, "return_tree": True}}
    asked: dict[str, Any] = {"model": "default", "temperature": 1.0, **fields, "extra_body": extra}
    if is_chat:
        return client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **asked)
    return client.completions.create(prompt=prompt, **asked)


def rebase_trees(prompts: Sequence[str], width: int, **fields: Any) -> Iterator[list[Node]]:
    """The nodes of one search a prompt, with embeddings, from a server of its own; `fields` are of the requests."""
    asked = {"algorithm": "rebase", "return_embeddings": True}
    with running_server(["--search", "rebase"]) as url, ThreadPoolExecutor(IN_FLIGHT) as pool:
        client = client_of(url, timeout_s=1800)
        answers = pool.map(lambda prompt: grow(client, prompt, width, asked, **fields), prompts)
        for answer in tqdm(answers, total=len(prompts), unit="tree"):
            yield answer.search["tree"]["nodes"]


def growth(nodes: Sequence[Node]) -> list[tuple[Any, ...]]:
    """Every node by its place, with its tokens and what became of it: equal for searches that went the same way."""
    return [tuple(node[key] for key in GROWTH) for node in nodes]


def trajectory(leaf: Node, by_id: Mapping[int, Node]) -> tuple[int, ...]:
    """The tokens from the prompt's end to the end of this node's step."""
    return tuple(token for step in path_to(leaf, by_id) for token in step["token_ids"])


def trajectory_text(leaf: Node, by_id: Mapping[int, Node]) -> str:
    """The text from the prompt's end to the end of this node's step."""
    return "".join(step["text"] for step in path_to(leaf, by_id))


def num_distinct_prefixes(nodes: Sequence[Node]) -> int:
    """Distinct token prefixes of the trajectories, the prompt aside: what any engine must compute, or find computed."""
    by_id = {node["id"]: node for node in nodes}
    prefixes: set[tuple[int, ...]] = set()
    for node in nodes:
        token_ids = trajectory(node, by_id)
        before = len(token_ids) - len(node["token_ids"])
        prefixes |= {token_ids[:end] for end in range(before + 1, len(token_ids) + 1)}
    return len(prefixes)
