"""The backend `ets_tree` against plain attention, with its kernels and sglang's own in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_ets.kernels.dispatch import INTERPRETED
from sglang_ets.kernels.tree_attention import SharedWork

from sglang_ets.core.attention_plan import AttentionPlan, plan_paths

if not INTERPRETED:
    pytest.skip("runs in test_interpreter.py, under TRITON_INTERPRET=1", allow_module_level=True)

from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_ets.engine.tree_attention import PlanMismatch, TreeAttnBackend, refused_model

SIZE, SPLITS, CONTEXT, MAX_ROWS = 16, 3, 700, 12
PROMPT, STEP = 300, 120
IDS = [f"row {number}" for number in range(6)]
OWN = [3, 70, 1, 130, 5, 2]  # tokens of each row alone
PATHS = [
    [("prompt", 0, PROMPT), ("a", PROMPT, PROMPT + STEP)],
    [("prompt", 0, PROMPT), ("b", PROMPT, PROMPT + STEP)],
    [("prompt", 0, PROMPT), ("a", PROMPT, PROMPT + STEP)],
    [("prompt", 0, PROMPT), ("a", PROMPT, PROMPT + STEP)],
    [],
    [("prompt", 0, PROMPT), ("a", PROMPT, PROMPT + STEP)],
]
Batch = SimpleNamespace


def make_backend(heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> TreeAttnBackend:
    """With what sglang's constructor would have set from a model."""

    def construct(backend: Any, model_runner: Any) -> None:
        backend.num_head, backend.num_kv_head = heads, kv_heads
        backend.v_head_dim, backend.max_kv_splits, backend.max_context_len = SIZE, SPLITS, CONTEXT
        backend.device, backend.page_size, backend.use_mla, backend.dcp_size = "cpu", 1, False, 1
        backend.static_kv_splits, backend.enable_deterministic, backend.device_core_count = True, False, 0
        pools = torch.zeros(3000, kv_heads, SIZE)
        backend.token_to_kv_pool = SimpleNamespace(
            start_layer=0, get_key_buffer=lambda _layer: pools, get_value_buffer=lambda _layer: pools
        )
        backend.req_to_token = model_runner.req_to_token_pool.req_to_token
        backend.decode_attention_fwd = decode_attention_fwd
        backend.kv_index_translator = SimpleNamespace(pack_read_stream=pack, reads_are_translated=False)

    def pack(_plan: Any, *, req_pool_indices: Any, seq_lens: Any, indptr: Any, out: Any, kv_start_idx: Any) -> None:
        for row, request in enumerate(req_pool_indices.tolist()):
            start, length = int(kv_start_idx[row]), int(seq_lens[row])
            out[int(indptr[row]) : int(indptr[row + 1])] = tables[request, start : start + length]

    def stock_metadata(backend: Any, batch: Any, *_args: Any) -> None:
        backend.forward_metadata = metadata(backend, batch, tables)

    def graph_state(backend: Any, max_bs: int, max_num_tokens: int) -> None:
        backend.cuda_graph_kv_indices = torch.zeros(max_num_tokens * CONTEXT, dtype=torch.int64)

    tables = page_tables()
    monkeypatch.setattr(TritonAttnBackend, "__init__", construct)
    monkeypatch.setattr(TritonAttnBackend, "init_forward_metadata", stock_metadata)
    monkeypatch.setattr(TritonAttnBackend, "init_forward_metadata_out_graph", stock_metadata)
    monkeypatch.setattr(TritonAttnBackend, "init_cuda_graph_state", graph_state)
    pool = SimpleNamespace(size=MAX_ROWS, req_to_token=tables)
    return TreeAttnBackend(SimpleNamespace(req_to_token_pool=pool, dtype=torch.float32))


def page_tables() -> torch.Tensor:
    """Requests 1 to 6 with the slots of their positions, scattered; request 0 is padding."""
    free = iter(torch.randperm(3000, generator=torch.Generator().manual_seed(1)).tolist())
    slots: dict[Any, list[int]] = {}
    tables = torch.zeros(MAX_ROWS, CONTEXT, dtype=torch.int32)
    for row, (path, own) in enumerate(zip(PATHS, OWN, strict=True)):
        pages = [
            slot for span in path for slot in slots.setdefault(span, [next(free) for _ in range(span[2] - span[1])])
        ]
        pages += [next(free) for _ in range(own)]
        tables[row + 1, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    return tables


def metadata(backend: Any, batch: Any, tables: torch.Tensor) -> SimpleNamespace:
    """What sglang's code makes for a batch: the slots of all positions of all rows."""
    bs = batch.batch_size
    indices = torch.cat(
        [tables[row, :length] for row, length in zip(batch.req_pool_indices, batch.seq_lens, strict=True)]
    )
    return SimpleNamespace(
        kv_indptr=torch.cat([torch.zeros(1), batch.seq_lens.cumsum(0)]).int(),
        kv_indices=indices.long(),
        attn_logits=torch.zeros(bs, backend.num_head, SPLITS, SIZE),
        attn_lse=torch.zeros(bs, backend.num_head, SPLITS),
        num_kv_splits=torch.full((bs,), SPLITS, dtype=torch.int32),
    )


def decode_batch(num_padding: int = 0, rids: list[str] | None = IDS) -> Batch:
    lengths = [(path[-1][2] if path else 0) + own for path, own in zip(PATHS, OWN, strict=True)] + [1] * num_padding
    rows = [*range(1, 7), *[0] * num_padding]
    return SimpleNamespace(
        batch_size=len(rows), req_pool_indices=torch.tensor(rows), seq_lens=torch.tensor(lengths), rids=rids,
        seq_lens_sum=sum(lengths), spec_info=None, kv_loc_plan=None, num_padding=num_padding,
        forward_mode=SimpleNamespace(is_decode=lambda: True),
    )  # fmt: skip


def plan() -> AttentionPlan:
    made = plan_paths(PATHS)
    assert len(made.spans) == 2, "the prompt and step a pay"
    return made


class Layer:
    """Random queries and pools, and attention with them."""

    def __init__(self, backend: TreeAttnBackend, num_rows: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.backend = backend
        self.query = torch.randn(num_rows, backend.num_head, SIZE, generator=generator)
        self.pools = [torch.randn(3000, backend.num_kv_head, SIZE, generator=generator) for _ in range(2)]

    def run(self, **settings: Any) -> torch.Tensor:
        """As sglang's `forward_decode` calls it."""
        output, made = torch.full_like(self.query, torch.nan), self.backend.forward_metadata
        positional = (made.kv_indptr, made.kv_indices, made.attn_logits, made.attn_lse, made.num_kv_splits)
        given = {"logit_cap": 0.0, "sinks": None, "xai_temperature_len": -1, "score_mod": None} | settings
        self.backend.decode_attention_fwd(self.query, *self.pools, output, *positional, SPLITS, 0.25, 1.0, 1.0, **given)
        return output

    def expected(self, batch: Batch) -> torch.Tensor:
        outputs = []
        group = self.backend.num_head // self.backend.num_kv_head
        for query, row, length in zip(self.query, batch.req_pool_indices, batch.seq_lens, strict=True):
            slots = self.backend.req_to_token[row, :length].long()
            keys, values = (pool[slots].repeat_interleave(group, dim=1) for pool in self.pools)
            weights = (torch.einsum("hd,nhd->hn", query, keys) * 0.25).softmax(-1)
            outputs.append(torch.einsum("hn,nhd->hd", weights, values))
        return torch.stack(outputs)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The items of each launch of the kernel for shared KV."""
    launched: list[int] = []
    import sglang_ets.engine.tree_attention as module

    original = module.shared_partials

    def watched(work: SharedWork, *, backend: str) -> None:
        if len(work.query) > 1:  # one row is the warm-up
            launched.append(len(work.items))
        original(work, backend=backend)

    monkeypatch.setattr(module, "shared_partials", watched)
    return launched


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1)])
def test_a_planned_decode_is_attention(
    heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch, work: list[int]
) -> None:
    backend, batch = make_backend(heads, kv_heads, monkeypatch), decode_batch()
    backend.load_plan(IDS, plan())
    backend.init_forward_metadata(batch)
    for seed in range(2):
        layer = Layer(backend, batch.batch_size, seed)
        torch.testing.assert_close(layer.run(), layer.expected(batch), atol=2e-6, rtol=2e-6)
    assert len(work) == 2 and work[0] > 2


def test_an_empty_plan_runs_the_stock_code_alone(monkeypatch: pytest.MonkeyPatch, work: list[int]) -> None:
    backend, batch = make_backend(8, 2, monkeypatch), decode_batch()
    backend.load_plan(IDS, plan_paths([[] for _ in IDS]))
    backend.init_forward_metadata(batch)
    layer = Layer(backend, batch.batch_size)
    torch.testing.assert_close(layer.run(), layer.expected(batch), atol=2e-6, rtol=2e-6)
    assert work == []


def test_a_graph_captured_without_a_plan_serves_each_plan_and_none(
    monkeypatch: pytest.MonkeyPatch, work: list[int]
) -> None:
    """What a graph holds is launches on buffers: the launches of the capture are repeated on what replays write there."""
    backend = make_backend(8, 2, monkeypatch)
    backend.init_cuda_graph_state(8, 8)
    batch = decode_batch(num_padding=2, rids=None)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    captured = backend._rest
    layer = Layer(backend, batch.batch_size)
    for made in (plan(), plan_paths([[] for _ in IDS]), plan()):
        backend.load_plan(IDS, made)
        backend.init_forward_metadata_out_graph(batch)
        backend._rest = captured
        torch.testing.assert_close(layer.run(), layer.expected(batch), atol=2e-6, rtol=2e-6)
    assert len(set(work)) == 1, "the launches do not depend on the plan"


def test_the_page_table_is_read_until_a_planned_decode_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose row another request gets while a pass runs, on a GPU with the overlap schedule, others may read what they share."""
    backend, batch = make_backend(8, 2, monkeypatch), decode_batch()
    ends = []
    for made in (plan(), plan_paths([[] for _ in IDS])):
        backend.load_plan(IDS, made)
        ends.append([backend.shared_read_ends(mode) for mode in (ForwardMode.DECODE, ForwardMode.EXTEND)])
    stock = [SharedReadEnds.IN_REPLAY, SharedReadEnds.UNKNOWN]
    assert ends == [[SharedReadEnds.POST_REPLAY, SharedReadEnds.UNKNOWN], stock]
    backend.load_plan(IDS, plan())
    backend.init_forward_metadata(batch)
    layer = Layer(backend, batch.batch_size)
    expected = layer.expected(batch)
    backend.req_to_token.zero_()
    assert not torch.allclose(layer.run(), expected)


def test_layers_that_are_not_plain_run_the_stock_code(monkeypatch: pytest.MonkeyPatch, work: list[int]) -> None:
    backend, batch = make_backend(8, 2, monkeypatch), decode_batch()
    backend.load_plan(IDS, plan())
    backend.init_forward_metadata(batch)
    layer = Layer(backend, batch.batch_size)
    layer.run(logit_cap=30.0)
    layer.run(sinks=torch.zeros(8))
    assert work == []


def test_another_batch_than_planned_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend(8, 2, monkeypatch)
    backend.init_cuda_graph_state(8, 8)
    backend.load_plan(IDS[:5], plan_paths(PATHS[:5]))
    with pytest.raises(PlanMismatch, match="a decode of 6 rows was about to read KV as planned for 5 others"):
        backend.init_forward_metadata(decode_batch())
    with pytest.raises(PlanMismatch, match="6 rows"):
        backend.init_forward_metadata_out_graph(decode_batch(num_padding=2))
    backend.init_forward_metadata(decode_batch(rids=None))  # a pass of sglang's own, before anything is served


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_mla": True}, "latent attention"),
        ({"dcp_size": 2}, "context split over ranks"),
        ({"group": 64}, "this one has 64 in torch.bfloat16; give --attention-backend triton"),
    ],
)
def test_models_that_it_does_not_serve_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"use_mla": False, "dcp_size": 1, "group": 8} | change
    backend = SimpleNamespace(**given, kv_index_translator=SimpleNamespace(reads_are_translated=False))
    assert message in str(refused_model(backend, given["group"], torch.bfloat16))
