"""The PRM's KV pool and radix cache, and the one forward pass that fills them.

What is cached is defined by its tokens, so anything here may be given up at any time and computed again. That is also how a
fault ends: the whole cache is emptied, which leaves no lock, row or slot behind, wherever it happened.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sglang.srt.managers.overlap_utils import resolve_forward_inputs
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_ets.kv import Hold, RadixLedger

logger = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 8192  # extended in one forward pass at most, to bound the activations
MIN_SHARED_TOKENS = 16  # a pass more is worth while for a prefix of this length that two sequences of a batch lack


class PoolImbalance(RuntimeError):
    """A bug: tokens or rows of the PRM's pool belong to nobody."""


@dataclass(frozen=True)
class TokenRun:
    """Tokens to bring into the cache; the hidden states from `reuse_tokens` on are wanted."""

    token_ids: tuple[int, ...]
    reuse_tokens: int
    owner: str  # in whose name the result is locked


@dataclass(frozen=True)
class Extended:
    """A computed run, locked by `hold`."""

    place: int  # in what was asked for
    hold: Hold
    hidden: torch.Tensor  # float[n, H], the last n tokens of the run


class _PrmReq(Req):
    """A request whose cached prefix may be reused only so far that all wanted hidden states are computed."""

    reuse_tokens: int

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return int(min(super()._compute_max_prefix_len(input_len), self.reuse_tokens))


def _shared_tokens(one: Req, other: Req) -> int:
    """Tokens with which both begin."""
    ids = [np.frombuffer(req.origin_input_ids, dtype=np.int64) for req in (one, other)]
    length = min(map(len, ids))
    differing = np.flatnonzero(ids[0][:length] != ids[1][:length])
    return int(differing[0]) if len(differing) else length


class PrmPool:
    """Rows, slots, radix cache and ledger of the PRM. Scheduler thread only, inside the PRM's runtime context."""

    def __init__(self, worker: TpModelWorker) -> None:
        self._worker = worker
        self._rows, self._allocator = worker.get_memory_pool()
        self._cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self._rows,
                token_to_kv_pool_allocator=self._allocator,
                page_size=worker.model_runner.page_size,
                tree_components=(ComponentType.FULL,),
            )
        )
        self.ledger = RadixLedger(self._cache, self._allocator)
        self.size = int(self._allocator.available_size())
        self.tokens_extended = 0  # over the life of the server
        self._num_requests = 0

    @property
    def largest_run(self) -> int:
        """Tokens of the longest sequence that an otherwise empty pool can hold."""
        return self.size - int(self._cache.page_size)

    @property
    def free_tokens(self) -> int:
        """Tokens that can be had without giving up a lock."""
        return int(self._allocator.available_size() + self._cache.evictable_size())

    def extend(self, wanted: Sequence[TokenRun], make_room: Callable[[bool], bool]) -> list[Extended]:
        """Compute as many runs as fit into one forward pass, and lock them; the first one whenever it fits at all.

        `make_room(is_first)` gives up one lock, at any price for the first run, and returns False if it will not. No run is
        longer than `largest_run`, so the first one always fits. Whatever raises leaves the cache empty and without a lock.

        Raises:
            PoolImbalance: it does not, because something else keeps tokens or rows.
        """
        is_done = False
        try:
            reqs = self._fitting_requests(wanted, make_room)
            if not reqs:
                raise PoolImbalance(
                    f"the PRM's KV pool has no room for {len(wanted[0].token_ids)} tokens with all its locks given up, "
                    f"expected room for {self.largest_run}; {self._account()}"
                )
            extended = self._forward(reqs, wanted)
            is_done = True
            return extended
        finally:
            if not is_done:
                self.reset()

    def reset(self) -> None:
        """Empty the cache; every hold loses its lock."""
        self._cache.reset()
        self._allocator.clear()
        self._rows.clear()
        self.ledger.forget_locks()

    def check(self) -> None:
        """Compare both sides of the pool's account. Between two passes it must be balanced.

        Raises:
            PoolImbalance: tokens are lost, locked by nobody, or rows are still taken.
        """
        kept = self.free_tokens + int(self._cache.protected_size())
        is_owned = self.ledger.num_holds > 0 or not self._cache.protected_size()
        if kept != self.size or self._rows.available_size() != self._rows.size or not is_owned:
            raise PoolImbalance(f"the PRM's KV pool is out of balance: {self._account()}")

    def _account(self) -> str:
        return (
            f"{self._allocator.available_size()} tokens available + {self._cache.evictable_size()} evictable + "
            f"{self._cache.protected_size()} protected by {self.ledger.num_holds} locks, expected {self.size} in all; "
            f"{self._rows.available_size()} rows free, expected {self._rows.size}"
        )

    # ---- one forward pass ----

    def _fitting_requests(self, wanted: Sequence[TokenRun], make_room: Callable[[bool], bool]) -> dict[int, _PrmReq]:
        """By place in `wanted`, requests with their cached prefix locked, as long as tokens and rows are left for them."""
        reqs: dict[int, _PrmReq] = {}
        new_tokens = 0
        for place, run in enumerate(wanted):
            if len(reqs) == self._rows.available_size():
                break
            req = self._request(run)
            if self._is_better_later(req, list(reqs.values())):
                continue
            req.lock = self._cache.lock(req.last_node)
            grown = new_tokens + len(run.token_ids) - req.prefix_len + self._cache.page_size
            is_too_much = bool(reqs) and grown > MAX_BATCH_TOKENS
            while not is_too_much and grown > self.free_tokens:
                is_too_much = not make_room(not reqs)
            if is_too_much:
                self._cache.unlock(req.lock)
                break
            new_tokens = grown
            reqs[place] = req
        return reqs

    def _is_better_later(self, req: _PrmReq, chosen: Sequence[_PrmReq]) -> bool:
        """Whether a chosen request computes tokens that this one lacks too: in the next pass they are cached."""
        if req.reuse_tokens - req.prefix_len < MIN_SHARED_TOKENS:
            return False
        shared = min(max((_shared_tokens(req, other) for other in chosen), default=0), req.reuse_tokens)
        cacheable = shared - shared % self._cache.page_size
        return bool(cacheable - req.prefix_len >= MIN_SHARED_TOKENS)

    def _request(self, run: TokenRun) -> _PrmReq:
        params = SamplingParams(max_new_tokens=0)
        params.normalize(None)
        self._num_requests += 1
        req = _PrmReq(
            f"prm-{self._num_requests}",
            "",
            array("q", run.token_ids),
            params,
            vocab_size=self._worker.model_config.vocab_size,
            eos_token_ids=set(),
        )
        req.logprob_start_len = -1
        req.reuse_tokens = run.reuse_tokens
        req.init_next_round_input(self._cache)
        req.extend_end = len(req.full_untruncated_fill_ids)
        return req

    def _forward(self, reqs: dict[int, _PrmReq], wanted: Sequence[TokenRun]) -> list[Extended]:
        runner = self._worker.model_runner
        batch = ScheduleBatch.init_new(
            list(reqs.values()),
            self._rows,
            self._allocator,
            self._cache,
            self._worker.model_config,
            False,
            SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        resolve_forward_inputs(batch, None)
        forward = ForwardBatch.init_new(
            batch, runner, return_hidden_states_before_norm=False, capture_hidden_mode=CaptureHiddenMode.FULL
        )
        hidden = runner.forward(forward).logits_output.hidden_states
        lengths = [int(length) for length in batch.extend_lens]
        self.tokens_extended += sum(lengths)
        extended = []
        for (place, req), piece in zip(reqs.items(), hidden.split(lengths), strict=True):
            req.finished_reason, req.finished_len = FINISH_LENGTH(length=0), 0
            release_kv_cache(req, self._cache, checkpoint=True)
            # Nothing is allocated before the next lock, so the node cannot be evicted in between.
            extended.append(Extended(place, self.ledger.hold(wanted[place].owner, req.last_node), piece))
        return extended
