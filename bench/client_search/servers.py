"""One sglang server seen by a client: connections that stay open, and calls that must succeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

TIMEOUT_S = 600.0
IDLE_S = 1.0  # a server closes a connection that was idle for five; a frozen one could not say so


def connect(url: str) -> httpx.Client:
    """Thread-safe."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S)
    return httpx.Client(base_url=url, timeout=TIMEOUT_S, limits=limits)


def post(server: httpx.Client, path: str, body: Mapping[str, Any]) -> Any:
    """Answer of an endpoint.

    Raises:
        RuntimeError: the server refused the request.
    """
    answer = server.post(path, json=body)
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.url} answered {answer.status_code}: {answer.text[:500]}")
    return answer.json()
