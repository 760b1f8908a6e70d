"""Every kernel builds for three GPU generations without register spills, and uses tensor cores where it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

TARGETS = {"sm_80", "sm_90", "sm_100"}
DTYPES = {"float32", "float16", "bfloat16"}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
MAX_REGISTERS = 255  # what one thread can address; a kernel that needs more spills
SHARED_LIMIT_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # per program
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    """One report per build, from a process where Triton compiles (this one may be interpreting)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sglang_ets.kernels.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kernel", ["step_pool", "step_score", "pairwise_cosine", "shared_partials", "merge_partials"])
def test_every_dtype_is_built_for_every_target(reports: list[dict], kernel: str) -> None:
    built = {(report["target"], report["dtype"]) for report in reports if report["kernel"] == kernel}
    assert built == {(target, dtype) for target in TARGETS for dtype in DTYPES}


def test_hidden_sizes_reach_the_largest(reports: list[dict]) -> None:
    for kernel in ("step_pool", "step_score"):
        sizes = {report["hidden_size"] for report in reports if report["kernel"] == kernel}
        assert {128, 4096, 8192} <= sizes


def test_no_register_spills(reports: list[dict]) -> None:
    spilled = [report for report in reports if report["spill_store_bytes"] or report["spill_load_bytes"]]
    assert spilled == []


def test_registers_and_shared_memory_fit(
    reports: list[dict], record_testsuite_property: Callable[[str, object], None]
) -> None:
    for report in reports:
        name = "{kernel}-{target}-{dtype}-{hidden_size}".format(**report)
        record_testsuite_property(name, json.dumps(report))
        assert 0 < report["registers"] <= MAX_REGISTERS, name
        assert report["shared_bytes"] <= SHARED_LIMIT_BYTES[report["target"]], name


def test_attention_is_built_for_groups_and_sizes_of_heads(reports: list[dict]) -> None:
    sizes = {report["hidden_size"] for report in reports if report["kernel"] == "shared_partials"}
    assert sizes == {64, 128, 256}


def test_pairwise_cosine_uses_tensor_cores(reports: list[dict]) -> None:
    for report in (report for report in reports if report["kernel"] == "pairwise_cosine"):
        assert report["tensor_core"] == TENSOR_CORES[report["target"]]


def test_shared_partials_uses_tensor_cores(reports: list[dict]) -> None:
    for report in (report for report in reports if report["kernel"] == "shared_partials"):
        is_small = report["dtype"] == "float32"  # tiles of 16 rows, which only the oldest instruction takes
        assert report["tensor_core"] == ("mma.sync" if is_small else TENSOR_CORES[report["target"]])


def test_the_memory_bound_kernels_do_not(reports: list[dict]) -> None:
    with_dots = ("pairwise_cosine", "shared_partials")
    assert {report["tensor_core"] for report in reports if report["kernel"] not in with_dots} == {None}


def test_the_interpreter_cannot_compile() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "sglang_ets.kernels.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode != 0 and "unset it to compile" in done.stderr
