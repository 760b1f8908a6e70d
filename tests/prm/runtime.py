"""The runtime of sglang that a PRM engine finds in a scheduler, without a scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.embedded import MODELS


@contextmanager
def policy_runtime(rank: int, num_ranks: int, port: int) -> Iterator[Any]:
    """The policy model's server arguments, within its context and process groups, which sglang builds once per process."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.runtime_context import SpawnRanks, create_context, use_context
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(
        model_path=str(MODELS / "policy"),
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        disable_overlap_schedule=True,
        random_seed=1,
        tp_size=num_ranks,
    )
    context = create_context(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=rank))
    with use_context(context):
        bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
        bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(arguments))
        yield arguments
