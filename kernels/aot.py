"""Builds every kernel ahead of time for real GPUs, without a GPU, and reports what the assembler says of each.

`python -m sglang_ets.kernels.aot` prints one JSON object per build. The compile-time settings come from the same
functions as the launchers', so what is built here is what runs there. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from sglang_ets.kernels.dispatch import INTERPRETED, LaunchConfig
from sglang_ets.kernels.pairwise_cosine import launch_config as pairwise_cosine_config
from sglang_ets.kernels.pairwise_cosine import pairwise_cosine_kernel
from sglang_ets.kernels.step_pool import launch_config as step_pool_config
from sglang_ets.kernels.step_pool import step_pool_kernel
from sglang_ets.kernels.step_score import MAX_HEAD_ROWS, step_score_kernel
from sglang_ets.kernels.step_score import launch_config as step_score_config
from sglang_ets.kernels.tree_attention import (
    MAX_SHARED_SLOTS,
    merge_config,
    merge_partials_kernel,
    shared_config,
    shared_partials_kernel,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 90, 100)  # A100, H100/H200, B200
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HIDDEN_SIZES = (128, 896, 4096, 8192)
HEADS = ((1, 64), (7, 128), (8, 256))  # query heads of a KV head, and its size
STOCK_SPLITS = 8  # slots of the stock kernel, sglang's --triton-attention-num-kv-splits
BLACKWELL = 100  # from here on Triton assembles with its second ptxas
TENSOR_CORE_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
POOL_STRIDES = ("stride_query_row", "stride_keys_slot", "stride_values_slot")
# Multiples of 16 in a launch: pointers of torch's allocations, and strides of usual sizes.
ALIGNED_STRIDES = ("num_cols", "stride_row", "stride_head_row", *POOL_STRIDES)
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Build:
    """One kernel to compile: its name says the case, `types` and `config` are what the launcher would pass."""

    kernel: str
    function: triton.JITFunction
    dtype: torch.dtype
    hidden_size: int  # of attention: the size of a head
    types: Mapping[str, str]  # pointer and integer arguments; strides along contiguous rows are constants
    unit_strides: tuple[str, ...]
    config: LaunchConfig


@dataclass(frozen=True)
class BuildReport:
    """What came out of one build; the assembler's figures are per thread, shared memory per program."""

    kernel: str
    target: str
    dtype: str
    hidden_size: int
    num_warps: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    tensor_core: str | None
    num_instructions: int  # PTX instructions, before the assembler


def builds() -> Iterator[Build]:
    """Every kernel at each dtype and hidden size, with its heaviest options on."""
    for dtype in DTYPES:
        pointer = POINTER_TYPES[dtype]
        for hidden_size in HIDDEN_SIZES:
            yield _step_pool_build(dtype, pointer, hidden_size)
            yield _step_score_build(dtype, pointer, hidden_size)
        yield _pairwise_cosine_build(dtype, pointer)
        for group, head_size in HEADS:
            yield _shared_partials_build(dtype, pointer, group, head_size)
        yield _merge_partials_build(dtype, pointer, HEADS[-1][1])


def _step_pool_build(dtype: torch.dtype, pointer: str, hidden_size: int) -> Build:
    types = {"hidden_ptr": pointer, "offsets_ptr": "*i64", "out_ptr": "*fp32"}
    types |= dict.fromkeys(("num_rows", "num_cols", "stride_row"), "i32")
    config = step_pool_config(hidden_size)
    return Build("step_pool", step_pool_kernel, dtype, hidden_size, types, ("stride_col",), config)


def _step_score_build(dtype: torch.dtype, pointer: str, hidden_size: int) -> Build:
    types = {"hidden_ptr": pointer, "positions_ptr": "*i64", "head_ptr": pointer, "bias_ptr": pointer}
    types |= {"out_ptr": "*fp32"}
    types |= dict.fromkeys(("num_rows", "num_cols", "stride_row", "stride_head_row", "index"), "i32")
    config = step_score_config(hidden_size, MAX_HEAD_ROWS, has_bias=True, activation="softmax")
    unit_strides = ("stride_col", "stride_head_col")
    return Build("step_score", step_score_kernel, dtype, hidden_size, types, unit_strides, config)


def _pairwise_cosine_build(dtype: torch.dtype, pointer: str) -> Build:
    types = {"embeddings_ptr": pointer, "out_ptr": "*fp32"}
    types |= dict.fromkeys(("num_rows", "num_cols", "stride_row"), "i32")
    config = pairwise_cosine_config(dtype)
    return Build("pairwise_cosine", pairwise_cosine_kernel, dtype, HIDDEN_SIZES[-1], types, ("stride_col",), config)


def _shared_partials_build(dtype: torch.dtype, pointer: str, group: int, head_size: int) -> Build:
    types = dict.fromkeys(("query_ptr", "keys_ptr", "values_ptr"), pointer)
    types |= {"page_table_ptr": "*i32", "table_rows_ptr": "*i64", "items_ptr": "*i32", "order_ptr": "*i32"}
    types |= {"out_ptr": "*fp32", "lse_ptr": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys((*POOL_STRIDES, "stride_table_row", "num_slots"), "i32")
    config = shared_config(dtype, group, head_size, head_size)
    return Build("shared_partials", shared_partials_kernel, dtype, head_size, types, (), config)


def _merge_partials_build(dtype: torch.dtype, pointer: str, head_size: int) -> Build:
    types = {"out_ptr": "*fp32", "lse_ptr": "*fp32", "output_ptr": pointer}
    types |= dict.fromkeys(("num_heads", "stride_output_row", "stride_output_head"), "i32")
    config = merge_config(STOCK_SPLITS + MAX_SHARED_SLOTS, head_size)
    return Build("merge_partials", merge_partials_kernel, dtype, head_size, types, (), config)


def compile_for(build: Build, capability: int) -> BuildReport:
    """Compiles one build for one GPU generation and reads the assembler's report.

    Raises: RuntimeError under TRITON_INTERPRET, which leaves nothing to compile, or if the assembler says nothing.
    """
    if INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so the kernels are interpreted functions: unset it to compile them"
        )
    constants = dict(build.config.constants) | dict.fromkeys(build.unit_strides, 1)
    names = build.function.arg_names
    signature = {name: build.types.get(name, "constexpr") for name in names}
    attributes = {
        (names.index(name),): ALIGNED
        for name, kind in build.types.items()
        if kind.startswith("*") or name in ALIGNED_STRIDES
    }
    source = ASTSource(build.function, signature, constants, attributes)
    options = {"num_warps": build.config.num_warps, "num_stages": build.config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    report = _assembler_report(ptx, capability)
    return BuildReport(
        kernel=build.kernel,
        target=f"sm_{capability}",
        dtype=str(build.dtype).removeprefix("torch."),
        hidden_size=build.hidden_size,
        num_warps=build.config.num_warps,
        registers=_find(r"Used (\d+) registers", report),
        spill_store_bytes=_find(r"(\d+) bytes spill stores", report),
        spill_load_bytes=_find(r"(\d+) bytes spill loads", report),
        shared_bytes=compiled.metadata.shared,
        tensor_core=next((name for name in TENSOR_CORE_INSTRUCTIONS if name in ptx), None),
        num_instructions=len(re.findall(r"^\s+(?:@!?%p\d+ )?[a-z][\w.:]*\s[^;]*;", ptx, flags=re.MULTILINE)),
    )


@cache  # sizes above a block are one program
def _assembler_report(ptx: str, capability: int) -> str:
    tool = triton.knobs.nvidia.ptxas_blackwell if capability >= BLACKWELL else triton.knobs.nvidia.ptxas
    architecture = re.search(r"^\.target (sm_\w+)", ptx, flags=re.MULTILINE)
    if architecture is None:
        raise RuntimeError("the compiled PTX names no .target: Triton's output format changed, adapt this file")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        # The flags are Triton's own (backends/nvidia/compiler.py, make_cubin), so the figures are those of its cubin.
        command = [tool.path, "-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={architecture[1]}"]
        done = subprocess.run(
            [*command, str(source), "-o", str(Path(folder, "kernel.cubin"))], capture_output=True, text=True, check=True
        )
    return done.stderr


def _find(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    if found is None:
        raise RuntimeError(f"the assembler's report has no match for {pattern!r}: {report!r}")
    return int(found[1])


def main() -> None:
    for build in builds():
        for capability in TARGETS:
            sys.stdout.write(json.dumps(asdict(compile_for(build, capability))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
