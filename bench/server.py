"""A real server in a process of its own: start it, wait until it serves, stop it by pid."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

LAUNCHER = "sglang_ets.launch_server"
START_LIMIT_S = 900  # a model of half a billion parameters took 290 on a busy machine
STOP_LIMIT_S = 30
TAIL_LINES = 40
PORTS = range(20_000, 29_000)
T = TypeVar("T")


class ServerEnded(RuntimeError):
    """A server that was still to be used."""


class Places(Generic[T]):
    """Places of several servers (or clients of them), dealt out in turn; each is lent to one run at a time."""

    def __init__(self, servers: Sequence[T], count: int) -> None:
        self._free = SimpleQueue[T]()
        for place in range(count):
            self._free.put(servers[place % len(servers)])

    @contextmanager
    def lent(self) -> Iterator[T]:
        """The place that has been free longest; waits for one."""
        server = self._free.get()
        try:
            yield server
        finally:
            self._free.put(server)


@contextmanager
def running_server(
    flags: Sequence[str] = (),
    *,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    module: str = LAUNCHER,
    waiting: Callable[[float], None] = lambda _seconds: None,
) -> Iterator[str]:
    """`python -m MODULE FLAGS` on a free local port; yields its address.

    `waiting` is called with the seconds passed while the server starts. Whatever happens, nothing is left running.

    Raises:
        RuntimeError: the server ended or did not serve within `START_LIMIT_S`; the end of its log is in the message.
    """
    _end_by_exit()
    with tempfile.TemporaryDirectory() as folder:
        log = log or Path(folder) / "server.log"
        port = _free_port()
        command = [sys.executable, "-m", module, "--port", str(port), *flags]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, start_new_session=True
            )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_up(process, url, log, waiting)
            yield url
            if process.poll() is not None:
                raise ServerEnded(f"the server ended by itself:\n{_tail(log)}")
        finally:
            _stop(process)


def _end_by_exit() -> None:
    """Let SIGTERM end this process by `SystemExit`, so that the servers it started are stopped on the way."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def _free_port() -> int:
    """A port below those that the kernel hands out by itself: one of these may be taken again before the server listens."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on 127.0.0.1; stop what holds them")


def _wait_until_up(process: subprocess.Popen[bytes], url: str, log: Path, waiting: Callable[[float], None]) -> None:
    started = time.monotonic()
    while (passed := time.monotonic() - started) < START_LIMIT_S:
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{_tail(log)}")
        waiting(passed)
        try:
            with urllib.request.urlopen(f"{url}/health_generate", timeout=20):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no answer from the server after {START_LIMIT_S} s:\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait, then end the whole process group, so that no worker of a dead server stays."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the whole group is gone, as it should be
    process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
