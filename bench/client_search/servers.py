"""One sglang server seen by a client: a pool of connections that stay open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import urllib3

TIMEOUT_S = 600.0


class Server:
    """`POST` of JSON over connections that are kept alive. Thread-safe."""

    def __init__(self, url: str, num_connections: int) -> None:
        self._url = url
        # A server closes a connection that was idle for some seconds; a call that meets such a one is made again.
        again = urllib3.Retry(1, allowed_methods=None)
        self._pool = urllib3.PoolManager(maxsize=num_connections, retries=again, timeout=TIMEOUT_S)

    def reconnect(self) -> None:
        """Forget the open connections: a frozen server could not say that it wants to close them."""
        self._pool.clear()

    def generate(self, body: Mapping[str, Any]) -> Any:
        """Answer of `/generate`: a list of objects, or one.

        Raises:
            RuntimeError: the server refused the request.
        """
        return self.post("/generate", body)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Answer of any endpoint.

        Raises:
            RuntimeError: the server refused the request.
        """
        answer = self._pool.request("POST", self._url + path, json=body)
        if answer.status != 200:
            raise RuntimeError(
                f"{self._url}{path} answered {answer.status}: {answer.data[:500].decode(errors='replace')}"
            )
        return json.loads(answer.data)
