"""Which implementation is chosen, what is said about it, and under which name the package may be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sglang_ets.kernels import choose_backend, describe_backend, dispatch

from sglang_ets import kernels

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_device_decides() -> None:
    assert choose_backend(CPU) == "reference"
    assert choose_backend(CUDA) == "triton"


def test_the_override_decides() -> None:
    assert choose_backend(CUDA, "reference") == "reference"
    assert choose_backend(CUDA, "triton") == "triton"


def test_triton_takes_cpu_tensors_only_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert choose_backend(CPU, "triton") == "triton"
    assert choose_backend(CPU) == "reference"
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got device cpu: leave backend out"):
        choose_backend(CPU, "triton")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="one of 'triton', 'reference' or None, got 'numba'"):
        choose_backend(CPU, "numba")


def test_description_names_the_backend_and_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    assert describe_backend("cpu").startswith("kernels: torch ") and "reference on cpu" in describe_backend("cpu")
    assert describe_backend("cuda:0").startswith("kernels: Triton ")
    assert describe_backend("cuda:0").endswith("on cuda:0 (Some GPU, sm_90)")


def test_everything_exported_exists() -> None:
    assert all(hasattr(kernels, name) for name in kernels.__all__)
    assert kernels.__all__ == sorted(kernels.__all__, key=lambda name: (not name[0].isupper(), name))


def test_the_plain_name_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "import sglang_ets.kernels" in done.stderr.splitlines()[-1]
