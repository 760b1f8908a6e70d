"""Attention of one decode and of one level's extends on the CPU: stock sglang against `kernels/paged_attention.py`.

    python -m bench.attention [--tree] [--smoke]

Each case first compares all results, then times all sides in turns in the same run, one layer at a time. Pages lie as a search
leaves them: siblings share the pages of their prefix. One row a case goes to bench/results/attention.jsonl.

With `--tree`: one decode of rows that share a prompt, by the kernel with a plan and without, and by torch row by row; the least
of all repetitions. Rows go to bench/results/attention_tree.jsonl, a plot beside them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sglang_ets import cpu_shim

cpu_shim.install()  # before anything of sglang is imported

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Stock  # noqa: E402
from sglang_ets.kernels import PagedBatch, layout_of, paged_attention, paged_attention_reference  # noqa: E402
from sglang_ets.kernels.traffic import paged_attention_traffic  # noqa: E402
from sglang_ets.patches.torch_native import decode, extend  # noqa: E402

from bench import figures, rows  # noqa: E402
from bench.timing import in_turns  # noqa: E402
from sglang_ets.core.attention_plan import MAX_SEGMENTS_CPU, MIN_SAVED_TOKENS_CPU, Span, plan_paths  # noqa: E402

SEED = 0
MAX_ERROR = 1e-5
SIBLINGS = 4


@dataclass(frozen=True)
class Shape:
    """One layer of a model."""

    model: str
    heads: int
    kv_heads: int
    head_size: int

    def tensors(self, tokens: int, pool_tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """Query, output, and both pools, of random numbers."""
        generator = torch.Generator().manual_seed(SEED)
        query = torch.randn(tokens, self.heads, self.head_size, generator=generator).to(dtype)
        sizes = (pool_tokens, self.kv_heads, self.head_size)
        return [query, torch.empty_like(query), *(torch.randn(sizes, generator=generator).to(dtype) for _ in range(2))]


EMBEDDED, SMOLLM2 = Shape("embedded", 2, 2, 64), Shape("SmolLM2-135M", 9, 3, 64)


@dataclass(frozen=True)
class Case:
    """One layer's attention: `sequences` rows of about `kv_tokens`, of which `new_tokens` are new."""

    shape: Shape
    sequences: int
    kv_tokens: int
    new_tokens: int = 1


FULL = [
    Case(shape, sequences, kv_tokens, new_tokens)
    for shape in (EMBEDDED, SMOLLM2)
    for sequences, kv_tokens in ((16, 200), (64, 200), (256, 200), (16, 1000))
    for new_tokens in (1, 30)
]
SMOKE = [Case(EMBEDDED, 8, 60, new_tokens) for new_tokens in (1, 5)]


def inputs(case: Case) -> list[Any]:
    """What the backend passes by position, up to the lengths: query, output, pools, pages, rows, kv lengths."""
    generator = torch.Generator().manual_seed(SEED)
    own = max(case.new_tokens, case.kv_tokens // 5)  # tokens that a sequence shares with no other
    shared = case.kv_tokens - own
    lengths = torch.randint(case.kv_tokens - own // 2, case.kv_tokens + 1, (case.sequences,), generator=generator)
    pages = torch.zeros(case.sequences + 1, case.kv_tokens, dtype=torch.int32)
    used = 1
    for row in range(case.sequences):
        if row % SIBLINGS == 0:
            prefix = torch.arange(used, used + shared)
            used += shared
        pages[row + 1, :shared], pages[row + 1, shared:] = prefix, torch.arange(used, used + own)
        used += own
    tensors = case.shape.tensors(case.sequences * case.new_tokens, used)
    return [*tensors, pages, torch.arange(1, case.sequences + 1), lengths]


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """Milliseconds of both, in turns.

    Raises:
        RuntimeError: the results differ by more than `MAX_ERROR`.
    """
    args, settings = inputs(case), {"scaling": None, "enable_gqa": case.shape.heads != case.shape.kv_heads}
    if case.new_tokens == 1:
        args = [*args, None]
        original, hook = Stock._run_sdpa_forward_decode, decode
    else:
        new = torch.full_like(args[-1], case.new_tokens)
        args, settings = [*args, args[-1] - new, new, None], {**settings, "causal": True}
        original, hook = Stock._run_sdpa_forward_extend, extend
    backend = SimpleNamespace()
    sides = {
        "stock_ms": lambda: original(backend, *args, **settings),
        "ours_ms": lambda: hook(original, backend, *args, **settings),
    }
    expected = sides["stock_ms"]().clone()
    error = float((sides["ours_ms"]() - expected).abs().max())
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{case} is {error:.2e} from the stock result, more than {MAX_ERROR:.0e}")
    medians = {name: statistics.median(values) for name, values in in_turns(sides, repetitions).items()}
    ratio = medians["stock_ms"] / medians["ours_ms"]
    return {**row_of(case), **medians, "ratio": ratio, "max_abs_error": error, "torch_threads": torch.get_num_threads()}


def row_of(case: Case | TreeCase) -> dict[str, Any]:
    """The fields of a case and of its shape."""
    return vars(case.shape) | {name: value for name, value in vars(case).items() if name != "shape"}


@dataclass(frozen=True)
class TreeCase:
    """One layer's decode of `width` rows: a prompt that all share, a step that siblings share, a step of their own."""

    shape: Shape
    width: int
    shared_tokens: int
    dtype: str = "float32"
    step_tokens: int = 16


TREES = [
    TreeCase(shape, width, shared_tokens, dtype)
    for shape, dtype in ((EMBEDDED, "float32"), (SMOLLM2, "float32"), (SMOLLM2, "bfloat16"))
    for shared_tokens in (100, 1000)
    for width in (16, 64, 256)
]
SMOKE_TREES = [TreeCase(EMBEDDED, 8, 30)]
TREE_REPETITIONS = 30
TREE_KEY = ("model", "dtype", "shared_tokens", "width")
SIDES = {"torch_ms": "torch, row by row", "kernel_ms": "kernel", "plan_ms": "kernel with plan"}


def tree_inputs(case: TreeCase) -> tuple[PagedBatch, list[list[Span]]]:
    """The batch, without a plan, and what its rows share."""
    prompt, step = case.shared_tokens, case.step_tokens
    ends = [prompt, prompt + step, prompt + 2 * step]
    used = prompt
    pages = torch.zeros(case.width, ends[2], dtype=torch.int32)
    paths: list[list[Span]] = []
    for row in range(case.width):
        if row % SIBLINGS == 0:
            siblings = torch.arange(used, used + step)
            used += step
        pages[row] = torch.cat([torch.arange(prompt), siblings, torch.arange(used, used + step)])
        paths.append([("prompt", 0, prompt), (row // SIBLINGS, prompt, ends[1])])
        used += step
    query, output, *pools = case.shape.tensors(case.width, used, getattr(torch, case.dtype))
    rows_and_lengths = list(range(case.width)), [ends[2]] * case.width, [1] * case.width
    return PagedBatch(query, output, *pools, pages, *rows_and_lengths), paths


def measure_tree(case: TreeCase, repetitions: int) -> dict[str, Any]:
    """Least milliseconds of all three sides, in turns, and what the kernel reads.

    Raises:
        RuntimeError: the plan changes a bit.
    """
    batch, paths = tree_inputs(case)
    lengths = (batch.rows, batch.kv_lengths, batch.new_lengths)
    batch = replace(batch, layout=layout_of(*lengths))
    plan = plan_paths(paths, min_saved_tokens=MIN_SAVED_TOKENS_CPU, max_segments=MAX_SEGMENTS_CPU)
    planned = replace(batch, output=torch.empty_like(batch.output), layout=layout_of(*lengths, plan))
    sides = {
        "torch_ms": lambda: paged_attention_reference(replace(batch, output=torch.empty_like(batch.output))),
        "kernel_ms": lambda: paged_attention(batch),
        "plan_ms": lambda: paged_attention(planned),
    }
    in_turns(sides, 1)  # compiles
    if not torch.equal(batch.output, planned.output):
        raise RuntimeError(f"{case}: the plan changes the result")
    least = {name: min(values) for name, values in in_turns(sides, repetitions).items()}
    mebibytes = {f"{name}_mib": _requested_bytes(one) / 2**20 for name, one in (("kernel", batch), ("plan", planned))}
    return {**row_of(case), **least, **mebibytes, "torch_threads": torch.get_num_threads()}


def _requested_bytes(batch: PagedBatch) -> int:
    assert batch.layout is not None
    return paged_attention_traffic(
        kv_tokens_read=batch.layout.kv_tokens_read,
        kv_tokens_distinct=len(batch.k_cache),
        num_tokens=len(batch.query),
        num_heads=batch.query.shape[1],
        num_kv_heads=batch.k_cache.shape[1],
        head_size=batch.query.shape[2],
        dtype=batch.k_cache.dtype,
    ).requested_bytes


def tree_table(measured: Iterable[dict[str, Any]]) -> str:
    """Markdown, one line a case: its latest row."""
    latest = {tuple(row[name] for name in TREE_KEY): row for row in measured}
    header = ["heads of", "dtype", "shared tokens", "rows", *(f"{side} (ms)" for side in SIDES.values())]
    names = (*TREE_KEY, *SIDES, "kernel_mib", "plan_mib")
    cells = [[*(row[name] for name in names), f"{row['kernel_ms'] / row['plan_ms']:.1f}x"] for row in latest.values()]
    return rows.markdown([*header, "asks for (MiB)", "with plan (MiB)", "kernel / plan"], cells)


def plot_trees(measured: list[dict[str, Any]], path: Path) -> None:
    """Time against width: a panel for each shape, dtype and shared length."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in measured:
        groups.setdefault((row["model"], row["dtype"], row["shared_tokens"]), []).append(row)
    with figures.panels(path, len(groups), width=3.4, height=3.2, sharey=True) as axes:
        for axis, ((model, dtype, shared), group) in zip(axes, groups.items(), strict=True):
            for name, label in SIDES.items():
                axis.plot([row["width"] for row in group], [row[name] for row in group], marker="o", label=label)
            axis.set(title=f"{model}, {dtype},\n{shared} shared tokens", xlabel="rows", xscale="log", yscale="log")
            axis.set_xticks([row["width"] for row in group], [str(row["width"]) for row in group])
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes[0].set_ylabel("ms a layer")
        axes[0].legend(fontsize="small", loc="upper left")


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown, one line a case."""
    header = ["heads of", "sequences", "KV tokens", "new tokens", "stock (ms a layer)", "ours (ms a layer)", "ratio"]
    names = ("model", "sequences", "kv_tokens", "new_tokens", "stock_ms", "ours_ms")
    return rows.markdown(header, [[*(row[name] for name in names), f"{row['ratio']:.1f}x"] for row in measured])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows.add_arguments(parser, "two small cases")
    parser.add_argument("--tree", action="store_true", help="rows that share a prompt, with a plan and without")
    args = parser.parse_args()
    if args.tree:
        out = rows.out_of(args, "attention_tree")
        cases = SMOKE_TREES if args.smoke else TREES
        measured = [measure_tree(case, 3 if args.smoke else TREE_REPETITIONS) for case in cases]
        plot_trees(measured, out.with_suffix(".png"))
    else:
        out = rows.out_of(args, "attention")
        measured = [measure(case, repetitions=3 if args.smoke else 9) for case in (SMOKE if args.smoke else FULL)]
    for row in measured:
        rows.append(out, row)
    print((tree_table if args.tree else table)(measured))


if __name__ == "__main__":
    main()
