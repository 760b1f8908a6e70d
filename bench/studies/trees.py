"""REBASE trees of a real server, for studies of what stands on their levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from tqdm import tqdm

from bench.redundancy import tree_of
from bench.server import running_server

IN_FLIGHT = 2


def rebase_trees(
    prompts: Sequence[str], width: int, max_tokens: int, seed: int,
    *, flags: Sequence[str] = (), search: Mapping[str, Any] | None = None,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """The nodes of one search a prompt, with embeddings, from a server with these flags."""
    asked = {"algorithm": "rebase", "return_tree": True, "return_embeddings": True, **(search or {})}
    with running_server(["--search", "rebase", *flags]) as url, ThreadPoolExecutor(IN_FLIGHT) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800, max_retries=0)

        def grow(prompt: str) -> list[dict[str, Any]]:
            answer = client.completions.create(
                model="default", prompt=prompt, max_tokens=max_tokens, temperature=1.0, seed=seed,
                extra_body={"search_width": width, "search": asked},
            )  # fmt: skip
            return list(tree_of(answer)["nodes"])

        yield from tqdm(pool.map(grow, prompts), total=len(prompts), unit="tree")
