"""Before any test imports sglang: make it importable on machines without CUDA. One profile for all hypothesis tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import sglang_ets
from sglang_ets import cpu_shim

cpu_shim.install()

# No deadline: an example that waited for a busy core is no failure. In CI the examples are the same in every run.
settings.register_profile("sglang-ets", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sglang-ets")

gc.disable()  # while torch, sglang and the tests are imported; what they make stays, so it is never looked through again


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def scheduler_context() -> Iterator[None]:
    """What sglang's requests and caches read of a scheduler process: its settings, without a model."""
    from sglang.srt.runtime_context import SpawnRanks, create_context, use_context
    from sglang.srt.server_args import ServerArgs

    model = Path(sglang_ets.__file__).parent / "models" / "policy"
    arguments = ServerArgs(model_path=str(model), device="cpu", dtype="float32", attention_backend="torch_native")
    with use_context(
        create_context(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    ):
        yield
