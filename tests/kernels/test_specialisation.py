"""Sizes that differ from batch to batch are no reason to compile a kernel again while requests wait."""

from __future__ import annotations

import pytest
from sglang_ets.kernels.dispatch import INTERPRETED
from sglang_ets.kernels.pairwise_cosine import pairwise_cosine_kernel
from sglang_ets.kernels.step_pool import step_pool_kernel
from sglang_ets.kernels.step_score import step_score_kernel
from sglang_ets.kernels.tree_attention import merge_partials_kernel, shared_partials_kernel

VARYING = {"num_rows"}  # arguments other than pointers, strides, and sizes that the model fixes


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "kernel",
    [step_pool_kernel, step_score_kernel, pairwise_cosine_kernel, shared_partials_kernel, merge_partials_kernel],
    ids=lambda kernel: kernel.__name__,
)
def test_varying_sizes_are_not_compiled_in(kernel: object) -> None:
    parameters = kernel.params  # type: ignore[attr-defined]
    varying = [one for one in parameters if one.name in VARYING]
    assert all(one.do_not_specialize for one in varying)
    assert bool(varying) == (kernel not in (shared_partials_kernel, merge_partials_kernel)), (
        "no size of the batch at all"
    )
