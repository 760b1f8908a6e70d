"""The stand-in for sgl_kernel: importable names, a clear error when called, present in spawned children."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys

import pytest
import torch

from sglang_ets import cpu_shim

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is needed")


@needs_no_cuda
def test_names_import_and_calling_one_says_what_is_missing() -> None:
    assert cpu_shim.install()
    from sgl_kernel import assign_req_to_token_pool_cpu

    with pytest.raises(NotImplementedError, match="assign_req_to_token_pool_cpu needs a CUDA device"):
        assign_req_to_token_pool_cpu()


@needs_no_cuda
def test_install_twice_adds_one_folder() -> None:
    cpu_shim.install()
    cpu_shim.install()
    assert sys.path.count(cpu_shim.FOLDER) == 1


@needs_no_cuda
def test_spawned_children_find_it() -> None:
    cpu_shim.install()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (spec,) = pool.map(importlib.util.find_spec, ["sgl_kernel"])  # of no file that would import torch
    assert spec.origin.startswith(cpu_shim.FOLDER)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--device", "cpu"], True),
        (["--device=cpu"], True),
        (["--device", "cuda"], False),
        (["cpu"], False),
        ([], False),
    ],
)
def test_is_cpu_asked_for(argv: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    assert cpu_shim.is_cpu_asked_for(argv) is expected
