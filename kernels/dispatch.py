"""Which implementation runs, and the checks and settings that all kernels share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import triton

Backend = Literal["triton", "reference"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HIDDEN = 16384  # one program keeps a whole hidden state in registers; above this it would spill
WARP_THREADS = 32
MAX_WARPS = 16

# @triton.jit reads the same setting when it decorates, so this says what the kernels of this process became.
INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class LaunchConfig:
    """Compile-time settings of one launch; the launcher and the ahead-of-time build take them from one function."""

    constants: Mapping[str, float]  # most are integers or booleans
    num_warps: int
    num_stages: int


def choose_backend(device: torch.device, backend: Backend | None = None) -> Backend:
    """The implementation that runs for tensors on `device`: Triton on CUDA, the torch reference elsewhere.

    `backend` overrides the choice. Under TRITON_INTERPRET=1 (set before triton is imported) Triton also takes
    CPU tensors, but only when asked: the interpreter is for tests.

    Raises: ValueError for an unknown backend, or for Triton on tensors it cannot run on.
    """
    if backend is None:
        return "triton" if device.type == "cuda" else "reference"
    if backend not in ("triton", "reference"):
        raise ValueError(f"backend must be one of 'triton', 'reference' or None, got {backend!r}")
    if backend == "triton" and device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got device {device}: leave backend out to use the torch reference, "
            "or set TRITON_INTERPRET=1 before Python starts to run Triton's interpreter on the CPU"
        )
    return backend


def describe_backend(device: torch.device | str) -> str:
    """One line for the server's start-up log: which implementation runs on `device`, and on what hardware."""
    device = torch.device(device)
    if choose_backend(device) == "reference":
        return f"kernels: torch {torch.__version__} reference on {device.type} (Triton runs on CUDA only)"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"kernels: Triton {triton.__version__} on {device} ({name}, sm_{major}{minor})"


def check_matrix(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless `tensor` is a float matrix whose rows fit one program."""
    if tensor.ndim != 2 or tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} must be a 2-D float32, float16 or bfloat16 tensor, "
            f"got {tensor.dtype} with shape {tuple(tensor.shape)}: reshape or cast it"
        )
    if not 1 <= tensor.shape[1] <= MAX_HIDDEN:
        raise ValueError(f"{name} must have 1 to {MAX_HIDDEN} columns, got {tensor.shape[1]}: split or project it")


def check_vector(name: str, tensor: torch.Tensor, size: int, device: torch.device) -> None:
    """Raises ValueError unless `tensor` is a float vector of `size` elements on `device`."""
    if tuple(tensor.shape) != (size,) or tensor.dtype not in FLOAT_DTYPES or tensor.device != device:
        raise ValueError(
            f"{name} must be a float vector of {size} elements on {device}, "
            f"got {tensor.dtype} with shape {tuple(tensor.shape)} on {tensor.device}: match it to the other arguments"
        )


def check_indices(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raises ValueError unless `tensor` is a 1-D int64 tensor on the CPU or on `device`."""
    if tensor.ndim != 1 or tensor.dtype != torch.int64:
        raise ValueError(
            f"{name} must be a 1-D int64 tensor, got {tensor.dtype} with shape {tuple(tensor.shape)}: cast or flatten"
        )
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(f"{name} must be on the CPU or on {device}, got {tensor.device}: move it there")


def warps_for_row(block: int, elements_per_thread: int = 8) -> int:
    """Warps which give each thread about `elements_per_thread` elements of a row: 8 halves are one 16-byte load."""
    return max(1, min(MAX_WARPS, block // (WARP_THREADS * elements_per_thread)))
