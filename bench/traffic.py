"""What benches and tests watch a server with: ordinary requests beside the load, its memory, its locks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType
from urllib.parse import urlsplit

import httpx
import psutil

ORDINARY_BODY = {"model": "default", "prompt": "10*5-2+10*10+9-18=\n", "max_tokens": 8}
PAUSE_S = 0.5
ANSWER_LIMIT_S = 120.0


class OrdinaryTraffic:
    """Ordinary requests, one after another, on a thread of their own from the beginning to the end of a `with` block."""

    def __init__(self, url: str, pause_s: float = PAUSE_S) -> None:
        self.seconds: list[float] = []  # per request, failed ones too
        self.num_failed = 0
        self._url = url
        self._pause_s = pause_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> OrdinaryTraffic:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=ANSWER_LIMIT_S) as client:
            while not self._ended.wait(self._pause_s):
                started = time.monotonic()
                try:
                    is_sound = client.post("/v1/completions", json=ORDINARY_BODY).status_code == 200
                except httpx.HTTPError:
                    is_sound = False
                self.num_failed += not is_sound
                self.seconds.append(time.monotonic() - started)


def memory_mb(url: str) -> dict[str, float]:
    """Anonymous resident memory, by process name, of the local server that listens there and of its child processes.

    Pages of files are left out: hundreds of MB of shared libraries, which the kernel drops and reads again as it likes.

    Raises:
        RuntimeError: nothing on this machine listens there.
    """
    port = urlsplit(url).port
    listening = [
        c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port and c.pid
    ]
    if not listening:
        raise RuntimeError(f"no process on this machine listens on port {port}; give the address of a local server")
    server = psutil.Process(listening[0])
    memory: Counter[str] = Counter()
    for process in (server, *server.children(recursive=True)):
        info = process.memory_info()
        memory[process.name()] += info.rss - info.shared
    return {name: size / 1e6 for name, size in sorted(memory.items())}


def locks_when_idle(client: httpx.Client, limit_s: float = 60.0) -> int:
    """Locks of searches, in both caches, once no search is live; searches that do not end count as one each."""
    end = time.monotonic() + limit_s
    while True:
        state = client.get("/server_info").json()["internal_states"][0]["search"]
        if not state["live"] or time.monotonic() > end:
            return int(state["locks"] + state["prm"]["locks"] + state["live"])
        time.sleep(0.2)
