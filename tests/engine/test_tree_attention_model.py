"""`ets_tree` in a model of sglang's: a decode that reads a cached prompt once gives what sglang's own kernels give."""

from __future__ import annotations

import socket
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_ets.kernels.dispatch import INTERPRETED

import sglang_ets

if not INTERPRETED:
    pytest.skip("runs in test_interpreter.py, under TRITON_INTERPRET=1", allow_module_level=True)

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.managers.overlap_utils import resolve_forward_inputs
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import SpawnRanks, create_context, use_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang_ets.patches import tree_attention

from sglang_ets.engine.tree_attention import TreeAttnBackend
from sglang_ets.engine.tree_plan import make_planner

POLICY = str(Path(sglang_ets.__file__).parent / "models" / "policy")
PROMPT = [5 + place % 20 for place in range(290)]
ROWS = 3


class Engine:
    """A worker with its pools and a radix cache: what a scheduler has of them."""

    def __init__(self, arguments: ServerArgs, port: int) -> None:
        self.worker = TpModelWorker(server_args=arguments, gpu_id=0, nccl_port=port)
        self.worker.alloc_memory_pool()
        self.worker.init_attention_backends()
        self.worker.init_cuda_graphs()
        self.rows, self.allocator = self.worker.get_memory_pool()
        parts = {"req_to_token_pool": self.rows, "token_to_kv_pool_allocator": self.allocator}
        self.cache = UnifiedRadixCache(
            CacheInitParams(disable=False, page_size=1, tree_components=(ComponentType.FULL,), **parts)
        )

    def request(self, rid: str, ids: Sequence[int]) -> Req:
        params = SamplingParams(max_new_tokens=8)
        params.normalize(None)
        vocabulary = self.worker.model_config.vocab_size
        req = Req(rid, "", array("q", ids), params, vocab_size=vocabulary, eos_token_ids=set())
        req.logprob_start_len = -1
        req.init_next_round_input(self.cache)
        req.extend_end = len(req.full_untruncated_fill_ids)
        req.lock = self.cache.lock(req.last_node)
        return req

    def extend(self, reqs: list[Req]) -> ScheduleBatch:
        """Compute the prompts; each request has its first token afterwards."""
        pools = (self.rows, self.allocator, self.cache)
        batch = ScheduleBatch.init_new(reqs, *pools, self.worker.model_config, False, SpeculativeAlgorithm.NONE)
        batch.prepare_for_extend()
        resolve_forward_inputs(batch, None)
        batch.output_ids = self.logits(batch).argmax(-1)
        for req, token in zip(reqs, batch.output_ids.tolist(), strict=True):
            req.output_ids.append(token)
        return batch

    def logits(self, batch: ScheduleBatch) -> torch.Tensor:
        runner = self.worker.model_runner
        forward = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        return runner.forward(forward).logits_output.next_token_logits.clone()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    tree_attention.register()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ServerArgs(
        model_path=POLICY, device="cpu", dtype="float32", attention_backend="ets_tree", disable_overlap_schedule=True,
        random_seed=1, max_total_tokens=4000, max_running_requests=8, disable_cuda_graph=True, skip_tokenizer_init=True,
    )  # fmt: skip
    context = create_context(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    with use_context(context), torch.no_grad():
        bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
        bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(arguments))
        yield Engine(arguments, port)


def decode_batch(engine: Engine) -> ScheduleBatch:
    """Requests that share a cached prompt, about to decode."""
    first = engine.extend([engine.request("first", PROMPT)]).reqs[0]
    first.finished_reason, first.finished_len = FINISH_LENGTH(length=0), 0
    release_kv_cache(first, engine.cache, checkpoint=True)
    batch = engine.extend([engine.request(f"row {row}", [*PROMPT, 7 + row, 9]) for row in range(ROWS)])
    assert [req.prefix_len for req in batch.reqs] == [len(PROMPT)] * ROWS
    tokens: Any = batch.output_ids
    batch.prepare_for_decode()
    batch.input_ids = tokens
    return batch


def test_a_decode_with_a_plan_gives_the_logits_of_one_without(engine: Engine) -> None:
    batch = decode_batch(engine)
    backend = engine.worker.model_runner.attn_backend
    assert isinstance(backend, TreeAttnBackend)
    stock = engine.logits(batch)
    assert backend._rest is None
    plan = make_planner(SimpleNamespace(tp_worker=engine.worker, tree_cache=engine.cache, enable_overlap=False))
    assert plan is not None
    plan(batch)
    planned = engine.logits(batch)
    assert backend._rest is not None
    assert backend._plan.private_from[:ROWS].tolist() == [len(PROMPT)] * ROWS
    torch.testing.assert_close(planned, stock, atol=2e-4, rtol=1e-4)
