"""A PRM engine in the test's own process: the embedded checkpoint, the real pool and radix cache, no server."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.embedded import MODELS
from tests.prm.runtime import policy_runtime

TOKENIZER = AutoTokenizer.from_pretrained(MODELS / "policy")


@pytest.fixture(scope="session")
def scheduler() -> Iterator[Any]:
    """What a PRM engine reads of a scheduler. sglang builds process groups once per process, so they stay."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with policy_runtime(0, 1, port) as arguments:
        gc.freeze()  # each pool that sglang makes begins with a collection, which would look through all that is imported
        yield SimpleNamespace(server_args=arguments, tokenizer=TOKENIZER, nccl_port=port, enable_overlap=False)


@pytest.fixture(scope="session")
def load_engine(scheduler: Any) -> Callable[..., Any]:
    """`load_engine(pool_tokens, folder, need)`: an engine with its pool."""
    from sglang_ets.prm.engine import PrmEngine, PrmSettings
    from sglang_ets.prm.sizing import PoolNeed

    small = PoolNeed(width=4, trajectory_tokens=50)

    def load(pool_tokens: int | None, folder: Path = MODELS / "prm", need: PoolNeed = small) -> Any:
        engine = PrmEngine.load(scheduler, PrmSettings(str(folder), need, max_total_tokens=pool_tokens))
        engine.init_memory_pools()
        return engine

    return load


@contextmanager
def changed_config(folder: Path, **changes: Any) -> Iterator[None]:
    """config.json of a checkpoint with other values, until the block ends."""
    path = folder / "config.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(before) | changes), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")
