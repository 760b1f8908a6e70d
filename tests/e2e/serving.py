"""A real server for tests: start it, wait until it serves, stop it by pid."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

import sglang_ets

START_LIMIT_S = 300
STOP_LIMIT_S = 30
PROBLEMS = [
    json.loads(line)
    for line in (Path(sglang_ets.__file__).parent / "models" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
]


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300, max_retries=0)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and decoded body; an error status is an answer too."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def search(self, prompt: str, width: int = 16, **fields: Any) -> dict[str, Any]:
        """One search; fails the test unless it is answered."""
        body = {"model": "default", "prompt": prompt, "max_tokens": 256, "search_width": width, **fields}
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        return dict(answer)

    def search_state(self) -> dict[str, Any]:
        return dict(self.get("/server_info")["internal_states"][0]["search"])

    def wait_until_no_search(self, limit_s: float = 30) -> dict[str, Any]:
        end = time.monotonic() + limit_s
        while (state := self.search_state())["live"] and time.monotonic() < end:
            time.sleep(0.2)
        return state


@contextmanager
def serving(log: Path, flags: Sequence[str] = (), **env: str) -> Iterator[Server]:
    """`python -m sglang_ets.launch_server FLAGS` on a free port, with sglang's own memory checks on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang_ets.launch_server", "--port", str(port), *flags]
    checks = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **checks, **env}, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_up(process, server)
        yield server
        assert process.poll() is None, f"the server died:\n{_tail(log)}"
    finally:
        _stop(process)


def _wait_until_up(process: subprocess.Popen[bytes], server: Server) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        assert process.poll() is None, f"the server did not start:\n{_tail(server.log)}"
        try:
            urllib.request.urlopen(f"{server.url}/health_generate", timeout=20)
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no server after {START_LIMIT_S} s:\n{_tail(server.log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])
