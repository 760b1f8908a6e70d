"""One test body over every implementation: the reference, or under TRITON_INTERPRET=1 the kernel, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest
import torch
import triton.language as tl
from sglang_ets.kernels.dispatch import INTERPRETED
from triton.runtime.interpreter import TensorHandle, interpreter_builder

# Triton's turn is when test_interpreter.py runs these files again under TRITON_INTERPRET=1.
BACKENDS = ("triton",) if INTERPRETED else ("reference",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def with_dtypes(*values: object) -> list[tuple[object, torch.dtype]]:
    """Each value in float32, and the last in every other dtype: the interpreter is too slow for every pair."""
    return [*((value, torch.float32) for value in values), *((values[-1], dtype) for dtype in DTYPES[1:])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20250)


@dataclass
class ByteCount:
    total: int = 0

    def add(self, mask: TensorHandle, dtype: tl.dtype) -> None:
        self.total += int(mask.data.sum()) * dtype.primitive_bitwidth // 8


@pytest.fixture
def count_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[ByteCount]]:
    """A context which counts the bytes that interpreted kernels load and store, masked-off elements excluded."""

    @contextmanager
    def counting() -> Iterator[ByteCount]:
        counted = ByteCount()
        load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

        def counted_load(ptrs: TensorHandle, mask: TensorHandle, *rest: object) -> TensorHandle:
            counted.add(mask, ptrs.get_element_ty())
            return load(ptrs, mask, *rest)

        def counted_store(ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: object) -> None:
            counted.add(mask, ptrs.get_element_ty())
            store(ptrs, value, mask, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(interpreter_builder, "create_masked_load", counted_load)
            patch.setattr(interpreter_builder, "create_masked_store", counted_store)
            yield counted

    return counting
