"""Children that start where their parent's step ended, without a prefill: decode-ready forks.

A fork's row names the slots of the tree's path in order, and the last token of the path is its first input. It joins the
running batch between two ticks, and what it holds is what any decoding request holds: a row, a lock on the path, and the slots
behind it. A child that cannot start so waits in sglang's queue and is extended by one token, as any request that has a cached
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_ets.engine.children import ChildReq
from sglang_ets.prm.stream import ForwardStream

MAX_PROMISED_TOKENS = 4096  # that one request is expected to generate at most, as sglang has it


def can_fork(scheduler: Any) -> bool:
    """Whether children may share the slots of their path: pages of one token, and a cache that holds nothing but KV."""
    cache = scheduler.tree_cache
    return (
        scheduler.page_size == 1
        and isinstance(cache, UnifiedRadixCache)
        and not cache.disable
        and tuple(cache.tree_components) == (ComponentType.FULL,)
        and not scheduler.enable_hierarchical_cache
        and not scheduler.enable_hisparse
        and scheduler.spec_algorithm.is_none()
        and not scheduler.model_config.is_encoder_decoder
    )


@dataclass
class ForkRoom:
    """What the engine has left for forks in one tick, beside everything that runs or waits."""

    rows: int
    tokens: float

    def take(self, tokens: int) -> bool:
        """Reserve a row and so many tokens. Returns False, and reserves nothing, if they are not there."""
        if self.rows < 1 or self.tokens < tokens:
            return False
        self.rows -= 1
        self.tokens -= tokens
        return True


class Forks:
    """Puts decode-ready children into the running batch. Scheduler thread only."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._stream = ForwardStream(scheduler)

    def room(self) -> ForkRoom:
        """Counted as sglang counts before a prefill: what runs may still generate, and all that waits goes first."""
        scheduler = self._scheduler
        batches = [batch for batch in (scheduler.running_batch, scheduler.last_batch) if batch is not None]
        running = {req.rid: req for batch in batches for req in batch.reqs if not req.finished()}
        waiting = scheduler.waiting_queue
        ratio = scheduler.new_token_ratio_tracker.current
        free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
        promised = ratio * sum(_left(req) for req in running.values())
        promised += sum(len(req.origin_input_ids) + len(req.output_ids) + _left(req) for req in waiting)
        rows = min(scheduler.req_to_token_pool.available_size(), scheduler.max_running_requests - len(running))
        return ForkRoom(rows - len(waiting), free - promised)

    def admits(self, child: ChildReq, room: ForkRoom) -> bool:
        """Whether the child can start decode-ready now; reserves its place."""
        source = child.source
        return source is not None and source.locked and room.take(_left(child))

    def join(self, children: Sequence[ChildReq], running: Any) -> Any:
        """The running batch with these children, which `admits` has let in; their rows and locks are taken here."""
        for child in children:
            self._share_path(child)
        batch = self._decode_batch(children)
        size = len(running.reqs)
        running.filter_batch()  # as the plan would do next; a finished request must not be merged with
        if len(running.reqs) < size:
            running.batch_is_full = False
        if running.is_empty():
            return batch
        running.merge_batch(batch)
        return running

    def _share_path(self, child: ChildReq) -> None:
        """Give the child a row over the slots of its path, and a lock of its own on it.

        Raises:
            RuntimeError: a bug, the path is shorter than what the child continues.
        """
        scheduler, kv, source = self._scheduler, child.kv, child.source
        assert source is not None, "only a child with a source is admitted"
        num_cached = len(child.origin_input_ids) + len(child.output_ids) - 1
        slots = scheduler.tree_cache.path_device_indices(source.node)[:num_cached]
        if len(slots) != num_cached:
            raise RuntimeError(f"child {child.rid} forks from {len(slots)} cached tokens; expected {num_cached}")
        scheduler.req_to_token_pool.alloc([child])
        scheduler.req_to_token_pool.write((kv.req_pool_idx, slice(0, num_cached)), slots.to(torch.int32))
        child.lock = scheduler.tree_cache.lock(source.node)
        child.last_node = source.node
        child.prefix_len = child.extend_end = child.cached_tokens = num_cached
        kv.cache_protected_len = kv.cache_inserted_len = kv.kv_committed_len = kv.kv_allocated_len = num_cached
        child.refresh_fill_ids()
        child.time_stats.set_forward_entry_time()
        child.time_stats.set_prefill_finished_time()

    def _decode_batch(self, children: Sequence[ChildReq]) -> Any:
        """A batch of these children alone, as if it had just been prefilled."""
        scheduler = self._scheduler
        batch = ScheduleBatch.init_new(
            reqs=list(children),
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            model_config=scheduler.model_config,
            enable_overlap=scheduler.enable_overlap,
            spec_algorithm=scheduler.spec_algorithm,
        )
        lengths = torch.tensor([child.prefix_len for child in children], dtype=torch.int64)
        rows = torch.tensor([child.kv.req_pool_idx for child in children], dtype=torch.int64)
        last = torch.tensor([child.output_ids[-1] for child in children], dtype=torch.int64)
        batch.forward_mode = ForwardMode.DECODE
        batch.req_pool_indices_cpu, batch.req_pool_indices = rows, rows.to(batch.device)
        batch.seq_lens_cpu, batch.seq_lens = lengths, lengths.to(batch.device)
        batch.orig_seq_lens = lengths.to(batch.device, torch.int32)
        batch.multimodal_inputs = [None] * len(children)
        self._leave_inputs(rows, last, batch.device)
        batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, scheduler.model_config.vocab_size)
        return batch

    def _leave_inputs(self, rows: torch.Tensor, last: torch.Tensor, device: torch.device | str) -> None:
        """Put the inputs of these rows (both int64[N]) where the next tick reads what the last one sampled for its rows.

        With the overlap schedule a row's former request may be in a pass that still runs, whose token would replace the input:
        so this comes behind that pass, and does not wait for it.
        """
        with self._stream.queued():
            places, inputs = (ids.to(device, non_blocking=True) for ids in (rows, last))
            self._scheduler.future_map.stash(places, RelayPayload(bonus_tokens=inputs))


def _left(req: Any) -> int:
    """Tokens that a request may still generate, as sglang estimates them."""
    return max(0, min(int(req.sampling_params.max_new_tokens) - len(req.output_ids), MAX_PROMISED_TOKENS))
