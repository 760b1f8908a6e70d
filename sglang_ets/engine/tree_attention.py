"""The attention backend `ets_tree`: sglang's Triton backend, whose decode reads KV that rows share once for all of them.

A plan (core/attention_plan.py) lies in buffers of fixed size on the device, so that CUDA graphs can hold the launches. Extends,
and layers or models that are not plain grouped-query attention, run the code of sglang.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.kernels.ops.attention.decode_attention import _decode_att_m_fwd, _decode_grouped_att_m_fwd
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from sglang_ets.core.attention_plan import AttentionPlan
from sglang_ets.kernels.tree_attention import (
    ITEM_FIELDS,
    ITEMS_PER_ROW,
    MAX_SHARED_SLOTS,
    TILE_ROWS,
    Partials,
    SharedWork,
    max_group,
    merge_partials,
    shared_partials,
    work_items,
)

logger = logging.getLogger(__name__)

MIN_ROWS = 2  # a graph for fewer rows is captured without the kernels for shared KV


class PlanMismatch(RuntimeError):
    """A bug: the rows of a decode are not those that were planned."""


class DevicePlan:
    """The plan of the next decode, on the device: work items, the order of the rows, where their private KV begins.

    One buffer, written by one copy. Rows and items that do not exist are zero, which means no work and nothing shared.
    """

    def __init__(self, max_rows: int, device: Any) -> None:
        self._num_item_fields = max_rows * ITEMS_PER_ROW * ITEM_FIELDS
        self._table = torch.zeros(self._num_item_fields + 2 * max_rows, dtype=torch.int32, device=device)
        items, self.order, self.private_from = self._parts(self._table)
        self.items = items.view(-1, ITEM_FIELDS)  # int32 [items, ITEM_FIELDS]
        self.num_items = 0
        self.rids: tuple[str, ...] = ()

    def _parts(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        items, rest = table.tensor_split([self._num_item_fields])
        order, private_from = rest.chunk(2)
        return items, order, private_from

    def load(self, rids: Sequence[str], plan: AttentionPlan, items: Any) -> None:
        """Replace the plan, in the order of the current stream; an empty one if there are no items."""
        was_empty, self.num_items, self.rids = not self.num_items, len(items), tuple(rids)
        if was_empty and not self.num_items:
            return
        host = torch.zeros(len(self._table), dtype=torch.int32, pin_memory=self._table.is_cuda)
        if self.num_items:
            host_items, order, private_from = self._parts(host)
            host_items[: items.size] = torch.from_numpy(items).flatten()
            order[: len(rids)] = torch.from_numpy(plan.order)
            private_from[: len(rids)] = torch.from_numpy(plan.private_from)
        self._table.copy_(host, non_blocking=True)


@dataclass
class PrivateRest:
    """What the stock kernel reads of each row, and where all kernels put their partial results."""

    rows: torch.Tensor  # int [rows], of req_to_token
    items: torch.Tensor  # int32 [items, ITEM_FIELDS]
    kv_indptr: torch.Tensor  # int32 [rows + 1]
    kv_indices: torch.Tensor  # int64 [tokens]
    num_kv_splits: torch.Tensor  # int32 [rows]
    partials: Partials


class TreeAttnBackend(TritonAttnBackend):  # type: ignore[misc]  # sglang has no types
    """See the module. `load_plan` comes before each decode whose rows have changed, on the stream of the decode."""

    decode_attention_fwd: Callable[..., None]

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        group = self.num_head // self.num_kv_head
        refusal = refused_model(self, group, model_runner.dtype)
        if refusal:
            raise SystemExit(refusal)
        self._tile = TILE_ROWS[model_runner.dtype] // group
        self._max_rows = model_runner.req_to_token_pool.size
        self._plan = DevicePlan(self._max_rows, self.device)
        self._rest: PrivateRest | None = None  # of the pass that runs or is captured; None: the stock path
        self._partials: Partials | None = None
        self._has_planned = False
        self._stock_decode = self.decode_attention_fwd
        self.decode_attention_fwd = torch.compiler.disable(self._decode)
        self._warm_up(model_runner.dtype)

    def _warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels before a search needs them; an item that ends where it starts is no work."""
        pool = self.token_to_kv_pool
        keys, values = pool.get_key_buffer(pool.start_layer), pool.get_value_buffer(pool.start_layer)
        if keys.dtype != dtype:
            return  # a compressed pool is left to sglang's code
        query = torch.zeros(1, self.num_head, keys.shape[2], dtype=dtype, device=self.device)
        items, zero = self._plan.items[:1], torch.zeros(1, dtype=torch.int64, device=self.device)
        partials = self._new_partials(1)
        partials.lse[:, :, 0] = 0.0
        work = SharedWork(query, keys, values, self.req_to_token, zero, items, self._plan.order, partials, 1.0)
        shared_partials(work, backend="triton")
        merge_partials(partials, query.new_empty(1, self.num_head, values.shape[2]), backend="triton")

    def load_plan(self, rids: Sequence[str], plan: AttentionPlan) -> None:
        """The rows of the next decode, in its order, and what they share. Queues a copy on the current stream."""
        items = work_items(
            plan.spans,
            num_rows=len(rids),
            tile=self._tile,
            first_slot=self.max_kv_splits,
            num_slots=MAX_SHARED_SLOTS,
        )
        if len(items) and not self._has_planned:
            self._has_planned = True
            logger.info(
                "ets_tree: the first decode that shares KV: %d rows, %d tokens of KV less to read",
                len(rids),
                plan.saved_tokens,
            )
        self._plan.load(rids, plan, items)

    # ---- before a pass ----

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        """Until when the scheduler must not write into the page table: the kernels for shared KV read it in every layer.

        sglang's own decode has read it before its first layer. Here the row of a request that has just ended, by which others
        read what they share, would become another path under them.
        """
        if fm.is_decode() and self._plan.num_items:
            return SharedReadEnds.POST_REPLAY
        return super().shared_read_ends(fm)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """As sglang's, for a pass without a CUDA graph."""
        super().init_forward_metadata(forward_batch)
        self._rest = None
        if not self._plan.num_items or not _is_plain_decode(forward_batch) or forward_batch.rids is None:
            return
        self._check_rows(len(forward_batch.rids), tuple(forward_batch.rids) == self._plan.rids)
        tokens, bs = forward_batch.seq_lens_sum, forward_batch.batch_size
        self._rest = PrivateRest(
            forward_batch.req_pool_indices,
            self._plan.items[: self._plan.num_items],
            torch.zeros(bs + 1, dtype=torch.int32, device=self.device),
            torch.empty(bs * self.max_context_len if tokens is None else tokens, dtype=torch.int64, device=self.device),
            torch.empty(bs, dtype=torch.int32, device=self.device),
            self._partials_for(bs),
        )
        self._fill(self._rest, forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As sglang's, with buffers for the private rests of the rows."""
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args, **kwargs)
        self._graph_indptr = torch.zeros(max_bs + 1, dtype=torch.int32, device=self.device)
        self._graph_indices = torch.zeros_like(self.cuda_graph_kv_indices)
        self._graph_splits = torch.ones(max_bs, dtype=torch.int32, device=self.device)
        self._graph_partials = self._new_partials(max_bs)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """As sglang's, for a pass that is captured, or replayed."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self._rest = None
        bs = forward_batch.batch_size
        if bs < MIN_ROWS or not _is_plain_decode(forward_batch):
            return
        if not in_capture and self._plan.num_items:
            num_rows = bs - forward_batch.num_padding
            self._check_rows(num_rows, num_rows == len(self._plan.rids))
        self._rest = PrivateRest(
            forward_batch.req_pool_indices,
            self._plan.items[: ITEMS_PER_ROW * bs],
            self._graph_indptr[: bs + 1],
            self._graph_indices,
            self._graph_splits[:bs],
            self._graph_partials,
        )
        self._fill(self._rest, forward_batch)

    def _fill(self, rest: PrivateRest, forward_batch: Any) -> None:
        """Write the pool slots of the private KV; on the device only, so that it can be captured."""
        bs = forward_batch.batch_size
        private_from = self._plan.private_from[:bs]
        lengths = forward_batch.seq_lens[:bs] - private_from
        rest.kv_indptr[1:] = torch.cumsum(lengths, dim=0)
        self.kv_index_translator.pack_read_stream(
            forward_batch.kv_loc_plan,
            req_pool_indices=forward_batch.req_pool_indices,
            seq_lens=lengths,
            indptr=rest.kv_indptr,
            out=rest.kv_indices,
            kv_start_idx=private_from,
        )
        self.get_num_kv_splits(rest.num_kv_splits, lengths)

    def _check_rows(self, num_rows: int, is_planned: bool) -> None:
        if not is_planned:
            raise PlanMismatch(
                f"a decode of {num_rows} rows was about to read KV as planned for {len(self._plan.rids)} others"
            )

    def _partials_for(self, num_rows: int) -> Partials:
        if self._partials is None or len(self._partials.lse) < num_rows:
            self._partials = self._new_partials(min(1 << (num_rows - 1).bit_length(), self._max_rows))
        return self._partials

    def _new_partials(self, num_rows: int) -> Partials:
        num_slots = self.max_kv_splits + MAX_SHARED_SLOTS
        return Partials.empty(num_rows, self.num_head, num_slots, self.v_head_dim, self.device)

    # ---- a layer ----

    def _decode(self, q: Any, k_buffer: Any, v_buffer: Any, o: Any, *args: Any, **kwargs: Any) -> None:
        """In the place of sglang's `decode_attention_fwd`: what rows share, then the rest of each, then both together."""
        rest = self._rest
        if rest is None or not self._is_plain_layer(q, k_buffer, *args, **kwargs):
            self._stock_decode(q, k_buffer, v_buffer, o, *args, **kwargs)
            return
        scale = args[STOCK_ARGUMENTS.index("sm_scale")]
        pages = (self.req_to_token, rest.rows, rest.items, self._plan.order)
        shared_partials(SharedWork(q, k_buffer, v_buffer, *pages, rest.partials, scale), backend="triton")
        first_stage = _decode_att_m_fwd if self.num_head == self.num_kv_head else _decode_grouped_att_m_fwd
        first_stage(
            q,
            k_buffer,
            v_buffer,
            rest.partials.out,
            rest.partials.lse,
            rest.kv_indptr,
            rest.kv_indices,
            rest.num_kv_splits,
            self.max_kv_splits,
            scale,
            0.0,
            page_size=self.page_size,
        )
        merge_partials(rest.partials, o, backend="triton")

    def _is_plain_layer(self, q: torch.Tensor, k_buffer: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        given = dict(zip(STOCK_ARGUMENTS, args, strict=False)) | kwargs
        is_scaled = given["k_scale"] != 1.0 or given["v_scale"] != 1.0 or k_buffer.dtype != q.dtype
        is_window = given["kv_indices"] is not self.forward_metadata.kv_indices
        is_other = given.get("logit_cap") or given.get("xai_temperature_len", -1) > 0
        others = (given.get("sinks"), given.get("score_mod"))
        return not (is_scaled or is_window or is_other) and others == (None, None)


# Of sglang's `decode_attention_fwd`, behind query, key pool, value pool and output.
STOCK_ARGUMENTS = (
    *("kv_indptr", "kv_indices", "attn_logits", "attn_lse", "num_kv_splits", "max_kv_splits"),
    *("sm_scale", "k_scale", "v_scale"),
)


def _is_plain_decode(forward_batch: Any) -> bool:
    return bool(forward_batch.forward_mode.is_decode()) and forward_batch.spec_info is None


def refused_model(backend: Any, group: int, dtype: torch.dtype) -> str | None:
    """Why a model cannot be served by `ets_tree`; one sentence, or None."""
    remedy = "give --attention-backend triton"
    if backend.use_mla or backend.dcp_size > 1 or backend.kv_index_translator.reads_are_translated:
        return (
            "--attention-backend ets_tree reads plain pools of keys and values, and this server has latent attention, "
            f"context split over ranks, or a pool with translated addresses; {remedy}"
        )
    if dtype not in TILE_ROWS or group > max_group(dtype):
        limits = ", ".join(f"{max_group(one)} in {one}" for one in TILE_ROWS)
        return (
            f"--attention-backend ets_tree serves models with at most so many query heads for each KV head: {limits}; "
            f"this one has {group} in {dtype}; {remedy}"
        )
    return None
