"""Servers of benches and tests: their ports, and that one ends with the bench that a signal ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import server as bench_server

SCRIPT = """
import sys
from pathlib import Path
from bench import server
Path(sys.argv[1]).write_text("")
server._wait_until_up = lambda process, url, log, waiting: None
Popen = server.subprocess.Popen
server.subprocess.Popen = lambda command, **options: Popen(["sleep", "600"], **options)
with server.running_server():
    (child,) = __import__("psutil").Process().children()
    Path(sys.argv[1]).write_text(str(child.pid))
    child.wait()
"""


def test_sigterm_stops_the_server_too(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    bench = subprocess.Popen([sys.executable, "-c", SCRIPT, str(told)], cwd=Path(__file__).resolve().parents[2])
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()):
        assert bench.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    server = psutil.Process(int(told.read_text()))
    bench.send_signal(signal.SIGTERM)
    assert bench.wait(30) == 128 + signal.SIGTERM
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench_server._free_port()
    assert first in bench_server.PORTS
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", first))
        monkeypatch.setattr(bench_server, "PORTS", range(first, first + 2))
        assert bench_server._free_port() == first + 1
        monkeypatch.setattr(bench_server, "PORTS", range(first, first + 1))
        with pytest.raises(RuntimeError, match=f"no port from {first} to {first} is free"):
            bench_server._free_port()
