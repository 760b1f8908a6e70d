"""What sglang's requests and caches read of a scheduler process: its settings, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import sglang_ets

MODEL = Path(sglang_ets.__file__).parent / "models" / "policy"


@pytest.fixture(scope="session", autouse=True)
def context() -> Iterator[None]:
    from sglang.srt.runtime_context import SpawnRanks, create_context, use_context
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path=str(MODEL), device="cpu", dtype="float32", attention_backend="torch_native")
    with use_context(
        create_context(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    ):
        yield
