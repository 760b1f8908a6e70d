"""A real server for tests, and what tests ask of it."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from bench.embedded import held_out_problems
from bench.server import LAUNCHER, running_server
from bench.trees import growth
from sglang_ets import cpu_shim
from sglang_ets.launch_server import chosen_flags
from tests.prm.two_ranks import CORES

PROBLEMS = held_out_problems()
KEY = "a-key-for-tests"
OVERLAPS = os.environ.get("OVERLAP") == "1"  # `make e2e OVERLAP=1`: of every server
# sglang asks for NUMA nodes, as many as processes, unless it is told which core is for which.
TWO_PROCESSES = {"SGLANG_CPU_OMP_THREADS_BIND": CORES, "SGLANG_NCCL_SO_PATH": "/nonexistent"}
ONE_TRAJECTORY_TOKENS = 600  # of a KV pool: one trajectory fits; the locks of a search of width 32 do not


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    api_key: str = "none"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, timeout=300, max_retries=0)

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"}

    def get(self, path: str) -> Any:
        return json.loads(self.text(path))

    def text(self, path: str) -> str:
        request = urllib.request.Request(self.url + path, headers=self.headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.read().decode())

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and decoded body; an error status is an answer too."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def search(self, prompt: str, width: int = 16, **fields: Any) -> dict[str, Any]:
        """One search; fails the test unless it is answered."""
        body = {"model": "default", "prompt": prompt, "max_tokens": 512, "search_width": width, **fields}
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


def grown_tree(server: Server, prompt: str, width: int, *, algorithm: str, **fields: Any) -> list[tuple[Any, ...]]:
    """The tree of one search: every node by its place, with its tokens and what became of it."""
    answer = server.search(prompt, width, search={"algorithm": algorithm, "return_tree": True}, **fields)
    return growth(answer["search"]["tree"]["nodes"])


@contextmanager
def serving(
    log: Path, flags: Sequence[str] = (), *, env: Mapping[str, str] | None = None, overlaps: bool = OVERLAPS
) -> Iterator[Server]:
    """A server with sglang's own memory checks on. With the overlap schedule by sglang's launcher: on a CPU ours has none."""
    given = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    given |= env or {}
    module = LAUNCHER
    if overlaps:
        chosen = [flag for flag in chosen_flags(flags, has_cuda=False) if flag != "--disable-overlap-schedule"]
        path = os.pathsep.join(filter(None, (cpu_shim.FOLDER, given.get("PYTHONPATH"))))
        flags, module = [*chosen, *flags], "sglang.launch_server"
        given |= {"PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1"}
    with running_server(flags, log=log, env=given, module=module) as url:
        yield Server(url, log)
