"""Servers of one comparison: started together, frozen while another is measured, their CPU time counted."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from bench.server import running_server


@dataclass(frozen=True)
class Running:
    """A server and the processes that it is made of."""

    url: str
    processes: tuple[psutil.Process, ...]  # the launcher first

    def freeze(self) -> None:
        """Stop all its processes where they are: an idle scheduler of sglang otherwise spins on a whole core."""
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on; the launcher last, so that it finds its children alive."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)


def search_flags(pool_tokens: int) -> list[str]:
    """The server with the search in its scheduler, on the embedded models."""
    return ["--search", "ets", *_pool_flags(pool_tokens), "--prm-max-total-tokens", str(pool_tokens)]


def stock_flags(model: Path, pool_tokens: int, dtype: str) -> list[str]:
    """A server without search.

    It waits for work without spinning, because the two of them share the cores while they are measured.
    """
    flags = ["--search", "off", "--model-path", str(model), "--dtype", dtype, *_pool_flags(pool_tokens)]
    return [*flags, "--skip-server-warmup", "--sleep-on-idle"]


def _pool_flags(pool_tokens: int) -> list[str]:
    """A pool is bounded by its tokens. Servers load at once, and of what is free then each may have nearly all."""
    return ["--max-total-tokens", str(pool_tokens), "--mem-fraction-static", "0.95"]


@contextmanager
def running(
    all_flags: Sequence[Sequence[str]],
    env: Mapping[str, str] | None = None,
    threads: Sequence[int | None] | None = None,  # of each server; None: as it decides
) -> Iterator[list[Running]]:
    """Start all servers at once; each is frozen as soon as it serves. All are ended in the end."""
    with ExitStack() as stack:

        def start(flags: Sequence[str], count: int | None) -> Running:
            own = {**(env or {}), **({"OMP_NUM_THREADS": str(count)} if count else {})}
            url = stack.enter_context(running_server(flags, env=own))
            server = Running(url, _processes_of(url))
            stack.callback(server.thaw)  # a frozen process does not hear that it shall end
            server.freeze()
            return server

        with ThreadPoolExecutor(len(all_flags)) as pool:
            servers = list(pool.map(start, all_flags, threads or [None] * len(all_flags)))
        yield servers


@contextmanager
def awake(servers: Sequence[Running]) -> Iterator[None]:
    """Only these servers run."""
    for server in servers:
        server.thaw()
    try:
        yield
    finally:
        for server in servers:
            server.freeze()


def _processes_of(url: str) -> tuple[psutil.Process, ...]:
    port = str(urlsplit(url).port)
    for process in psutil.Process().children():
        if port in process.cmdline():
            return (process, *process.children(recursive=True))
    raise RuntimeError(f"no child process serves {url}; a server that was started elsewhere cannot be measured")
