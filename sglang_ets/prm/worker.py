"""The PRM's runtime context and model worker, beside the policy model's in the same process."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.runtime_context import SpawnRanks, create_context, get_context, get_device, get_parallel, use_context
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import get_available_gpu_memory

from sglang_ets.core.attention_plan import TREE_BACKEND
from sglang_ets.prm import models
from sglang_ets.prm.sizing import budget_bytes

MAX_BATCH_STEPS = 256  # rows: each is as long as the context, and a batch ends at pool.MAX_BATCH_TOKENS anyhow
# Attention of other kinds than a PRM's, sparse or latent, which the policy model may have.
OTHER_ATTENTION = {
    *("dsa", "nsa", "qsa", "dsv4", "compressed"),
    *("flashmla", "cutlass_mla", "trtllm_mla", "cutedsl_mla", "tokenspeed_mla"),
}
# What the operator said about the policy model's checkpoint; it holds for the PRM only if that is the same one.
CHECKPOINT_FIELDS = ("revision", "quantization", "context_length")


def prm_arguments(policy: Any, model_path: str) -> dict[str, Any]:
    """Arguments of the PRM's worker that follow from the policy model's server arguments."""
    is_shared = model_path == policy.model_path
    same = {name: getattr(policy, name) for name in CHECKPOINT_FIELDS} if is_shared else {}
    return {
        "model_path": model_path,
        # Weights that are shared are not read a second time.
        "load_format": "dummy" if is_shared else "auto",
        "trust_remote_code": policy.trust_remote_code,
        "dtype": policy.dtype,
        "attention_backend": _attention_backend(policy.attention_backend),
        "enable_deterministic_inference": policy.enable_deterministic_inference,
        "random_seed": policy.random_seed or 1,
        **same,
    }


def _attention_backend(of_policy: str | None) -> str | None:
    """The policy model's where it can serve a PRM, which never decodes; None: what sglang chooses for the PRM."""
    if of_policy == TREE_BACKEND:
        return "triton"
    return None if of_policy in OTHER_ATTENTION else of_policy


def start_worker(
    scheduler: Any, model_path: str, max_total_tokens: int | None, num_ranks: int
) -> tuple[Any, TpModelWorker]:
    """The PRM's runtime context, and its worker with loaded weights and no memory pool yet.

    `num_ranks` is the policy model's tensor-parallel size, or 1: then each rank has a whole PRM and talks to no other.
    """
    models.register()
    main = get_context()
    args = ServerArgs(
        **prm_arguments(scheduler.server_args, model_path),
        device=get_device().device,
        tp_size=num_ranks,
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        max_total_tokens=max_total_tokens,
        max_running_requests=MAX_BATCH_STEPS,
        disable_cuda_graph=True,
    )
    is_whole = num_ranks < get_parallel().tp_size
    rank = 0 if is_whole else get_parallel().tp_rank
    ranks = SpawnRanks(world_rank=rank, dp_rank=main.parallel.dp_rank, gpu_id=get_device().gpu_id)
    context = create_context(args, role="scheduler", ranks=ranks)
    # Process groups exist once per process: the PRM's context borrows those of the policy model.
    groups = {name: group for name, group in main.parallel._stamp.items() if name not in context.parallel._stamp}
    if is_whole:  # a search has no pipeline, so that group is each rank alone
        groups |= {name: main.parallel.pp_group for name in groups if name.endswith("_group") and name != "world_group"}
    context.parallel.override_permanently(**groups)
    with use_context(context):
        return context, TpModelWorker(server_args=args, gpu_id=get_device().gpu_id, nccl_port=scheduler.nccl_port)


def token_bytes(worker: TpModelWorker) -> int:
    """Bytes of KV for one token on this rank."""
    config, runner = worker.model_config, worker.model_runner
    heads = config.get_num_kv_heads(get_parallel().tp_size)
    return int(
        config.num_hidden_layers * heads * (config.head_dim + config.v_head_dim) * runner.kv_cache_dtype.itemsize
    )


def pool_budget() -> int:
    """Bytes that the PRM's KV pool may take, the same on every rank, also where each has a whole PRM."""
    world, device = get_parallel().world_group, get_device()
    free_gb = get_available_gpu_memory(
        device.device, device.gpu_id, distributed=world.world_size > 1, cpu_group=world.cpu_group
    )
    return budget_bytes(free_gb * 2**30, is_host=device.device == "cpu")
