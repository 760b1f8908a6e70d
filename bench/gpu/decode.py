"""Decode attention of one layer where rows share KV: sglang's Triton kernels against those of `ets_tree`.

    python -m bench.gpu.decode            on a GPU
    TRITON_INTERPRET=1 python -m bench.gpu.decode --smoke     anywhere: results only, the times mean nothing

Both sides are checked against each other, then timed with a cold L2 cache. `bound_us` is the least time in which the KV that
must be read could be read, from the memory bandwidth that a copy reaches in the same process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton.testing

from sglang_ets import cpu_shim

cpu_shim.install()

from sglang.kernels.ops.attention.decode_attention import (  # noqa: E402
    _decode_att_m_fwd,
    _decode_grouped_att_m_fwd,
    decode_attention_fwd,
)
from sglang_ets.kernels.tree_attention import (  # noqa: E402
    MAX_SHARED_SLOTS,
    TILE_ROWS,
    Partials,
    SharedWork,
    merge_partials,
    shared_partials,
    work_items,
)

from bench import rows  # noqa: E402
from bench.timing import timed  # noqa: E402
from sglang_ets.core.attention_plan import AttentionPlan, plan_paths  # noqa: E402

SPLITS = 8  # sglang's --triton-attention-num-kv-splits
COPY_BYTES = 1 << 30
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KEY = ("model", "dtype", "width", "prompt_tokens", "step_tokens")


@dataclass(frozen=True)
class Case:
    """A level of a search: all rows share the prompt, and `width / fan_out` groups of rows each share their finished steps."""

    model: str
    heads: int
    kv_heads: int
    head_size: int
    width: int
    prompt_tokens: int
    step_tokens: int  # finished, of each row
    own_tokens: int  # of each row alone
    fan_out: int = 4


MODELS = (("Qwen2.5-7B", 28, 4, 128), ("Llama-3.1-8B", 32, 8, 128), ("Llemma-7B", 32, 32, 128))
FULL = tuple(
    Case(*model, width, prompt, steps, own_tokens=32)
    for model in MODELS
    for width in (16, 64, 256)
    for prompt, steps in ((128, 256), (1024, 512))
)
SMOKE = (Case("tiny", 8, 2, 16, 4, 280, 20, 3, fan_out=2), Case("tiny MHA", 2, 2, 16, 4, 280, 20, 3, fan_out=2))


class Level:
    """The tensors of a case, and both ways to attend."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case, self.device = case, device
        table, self.paths = _pages(case, generator)
        lengths = torch.full((case.width,), table.shape[1])
        self.private = torch.tensor(self.plan.private_from)
        pool = int(table.max()) + 1
        shape = (pool, case.kv_heads, case.head_size)
        random = torch.Generator(device=device).manual_seed(0)
        self.keys, self.values = (torch.randn(shape, generator=random, device=device, dtype=dtype) for _ in range(2))
        self.query = torch.randn(case.width, case.heads, case.head_size, generator=random, device=device, dtype=dtype)
        self.table, self.rows = table.to(device), torch.arange(case.width, device=device)
        self.whole = self._stream(table, torch.zeros_like(lengths))
        self.rest = self._stream(table, self.private)
        self.splits = torch.full((case.width,), SPLITS, dtype=torch.int32, device=device)
        self.scale = case.head_size**-0.5

    @property
    def plan(self) -> AttentionPlan:
        return plan_paths(self.paths)

    @property
    def distinct_tokens(self) -> int:
        return len(self.keys)

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values of one token."""
        return 2 * self.keys[0].numel() * self.keys.element_size()

    def _stream(self, table: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = [row[first:] for row, first in zip(table, start.tolist(), strict=True)]
        ends = torch.tensor([0, *map(len, pieces)]).cumsum(0).int()
        return ends.to(self.device), torch.cat(pieces).long().to(self.device)

    def stock(self) -> Callable[[], torch.Tensor]:
        """As sglang's backend calls it."""
        case, output = self.case, torch.empty_like(self.query)
        shape = (case.width, case.heads, SPLITS)
        out = torch.empty(*shape, case.head_size, device=self.device)
        lse = torch.empty(shape, device=self.device)
        pools = (self.keys, self.values)

        def run() -> torch.Tensor:
            decode_attention_fwd(
                self.query, *pools, output, *self.whole, out, lse, self.splits, SPLITS, self.scale, 1.0, 1.0
            )
            return output

        return run

    def tree(self) -> Callable[[], torch.Tensor]:
        """As `ets_tree` calls it; the plan is made before."""
        case, output = self.case, torch.empty_like(self.query)
        tile = TILE_ROWS[self.query.dtype] // (case.heads // case.kv_heads)
        slots = {"first_slot": SPLITS, "num_slots": MAX_SHARED_SLOTS}
        items = work_items(self.plan.spans, num_rows=case.width, tile=tile, **slots)
        partials = Partials.empty(case.width, case.heads, SPLITS + MAX_SHARED_SLOTS, case.head_size, self.device)
        plan = (torch.from_numpy(items).to(self.device), torch.from_numpy(self.plan.order).int().to(self.device))
        pools = (self.keys, self.values)
        work = SharedWork(self.query, *pools, self.table, self.rows, *plan, partials, self.scale)
        first_stage = _decode_att_m_fwd if case.heads == case.kv_heads else _decode_grouped_att_m_fwd
        buffers = (partials.out, partials.lse)

        def run() -> torch.Tensor:
            shared_partials(work, backend="triton")
            first_stage(self.query, *pools, *buffers, *self.rest, self.splits, SPLITS, self.scale, 0.0)
            merge_partials(partials, output, backend="triton")
            return output

        return run


def _pages(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, list[list[tuple[str, int, int]]]]:
    """Pool slots of each row's positions (int32 [rows, positions]), scattered; and the stretches that rows share."""
    groups = case.width // case.fan_out
    counts = (case.prompt_tokens, groups * case.step_tokens, case.width * case.own_tokens)
    prompt, steps, own = torch.randperm(sum(counts), generator=generator).int().split(counts)
    steps = steps.view(groups, case.step_tokens).repeat_interleave(case.fan_out, dim=0)
    table = torch.cat([prompt.expand(case.width, -1), steps, own.view(case.width, -1)], dim=1)
    ends = (case.prompt_tokens, case.prompt_tokens + case.step_tokens)
    paths = [[("prompt", 0, ends[0]), (f"steps {row // case.fan_out}", *ends)] for row in range(case.width)]
    return table.contiguous(), paths


def median_us(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return 1e3 * float(triton.testing.do_bench(run, return_mode="median"))
    return 1e3 * timed(run)[1]  # in the interpreter the times mean nothing


def copied_bytes_per_us(device: torch.device) -> float:
    """What a copy of a large buffer reads and writes in a microsecond."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES >> 6
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_us(lambda: target.copy_(source), device)


def measure(case: Case, device: torch.device, dtype: torch.dtype, bytes_per_us: float) -> dict[str, Any]:
    """Both sides of one case.

    Raises:
        RuntimeError: they differ.
    """
    level = Level(case, device, dtype)
    stock, tree = level.stock(), level.tree()
    error = float((stock().float() - tree().float()).abs().max())
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"{case} in {dtype}: the results differ by {error:.1e}, more than {TOLERANCE[dtype]:.0e}")
    read = case.width * level.table.shape[1]
    planned = read - level.plan.saved_tokens
    return {
        **asdict(case),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "max_abs_difference": error,
        "stock_us": median_us(stock, device),
        "tree_us": median_us(tree, device),
        "stock_kv_bytes": read * level.kv_bytes,
        "tree_kv_bytes": planned * level.kv_bytes,
        "bound_us": level.distinct_tokens * level.kv_bytes / bytes_per_us,
    }


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown, one line a case."""
    header = [*KEY, "stock (us)", "tree (us)", "bound (us)", "stock / tree", "KV asked / planned"]
    ratios = (("stock_us", "tree_us"), ("stock_kv_bytes", "tree_kv_bytes"))
    cells = [
        [*(row[name] for name in (*KEY, "stock_us", "tree_us", "bound_us")), *(row[a] / row[b] for a, b in ratios)]
        for row in measured
    ]
    return rows.markdown(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows.add_arguments(parser, "two tiny cases")
    args = parser.parse_args()
    out = rows.out_of(args, "gpu_decode")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.float32,) if args.smoke else (torch.bfloat16,)
    bytes_per_us = copied_bytes_per_us(device)
    measured = []
    for case in SMOKE if args.smoke else FULL:
        for dtype in dtypes:
            measured.append(measure(case, device, dtype, bytes_per_us))
            rows.append(out, measured[-1])
    print(table(measured))


if __name__ == "__main__":
    main()
