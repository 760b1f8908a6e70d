"""Kernels, each beside its torch reference; imported as `sglang_ets.kernels`.

One file per kernel: the reference (specification and CPU path), the Triton kernel, the launcher that chooses. `paged_attention`
is the other way round: for the CPU only, in Numba; on a GPU `tree_attention` adds to sglang's own what rows share.
"""

from __future__ import annotations

if __name__ != "sglang_ets.kernels":
    raise ImportError(
        f"this folder is the package sglang_ets.kernels, but it was imported as {__name__!r}: `kernels` is another "
        "project on PyPI. Install the repository (pip install -e .) and import sglang_ets.kernels."
    )

from sglang_ets.kernels.dispatch import Backend, choose_backend, describe_backend
from sglang_ets.kernels.paged_attention import (
    Layout,
    PagedBatch,
    layout_of,
    paged_attention,
    paged_attention_reference,
    slow_path_reason,
)
from sglang_ets.kernels.pairwise_cosine import pairwise_cosine, pairwise_cosine_reference
from sglang_ets.kernels.step_pool import step_pool, step_pool_reference
from sglang_ets.kernels.step_score import Activation, step_score, step_score_reference
from sglang_ets.kernels.tree_attention import Partials, SharedWork, merge_partials, shared_partials

__all__ = [
    "Activation",
    "Backend",
    "Layout",
    "PagedBatch",
    "Partials",
    "SharedWork",
    "choose_backend",
    "describe_backend",
    "layout_of",
    "merge_partials",
    "paged_attention",
    "paged_attention_reference",
    "pairwise_cosine",
    "pairwise_cosine_reference",
    "shared_partials",
    "slow_path_reason",
    "step_pool",
    "step_pool_reference",
    "step_score",
    "step_score_reference",
]
