"""The size of the PRM's pool without a flag, and what the PRM's worker takes over from the policy model's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ets.engine.startup import pool_need
from sglang_ets.flags import FLAGS
from sglang_ets.prm.sizing import (
    HOST_LIMIT_BYTES,
    MIN_POOL_TOKENS,
    SIZED_WIDTH,
    PoolNeed,
    budget_bytes,
    check_pool_tokens,
    default_pool_tokens,
)
from sglang_ets.prm.worker import prm_arguments

NEED = PoolNeed(width=64, trajectory_tokens=1024)
PLENTY = 10**12


@pytest.mark.parametrize(
    ("flags", "need"),
    [
        ({}, PoolNeed(SIZED_WIDTH, 1024)),
        ({"max_width": 16}, PoolNeed(16, 1024)),
        ({"max_tokens": 512}, PoolNeed(SIZED_WIDTH, 512)),
        ({"max_steps": 3, "max_step_tokens": 100}, PoolNeed(SIZED_WIDTH, 300)),
    ],
)
def test_need_follows_the_flags(flags: dict[str, Any], need: PoolNeed) -> None:
    assert pool_need({flag.key: flag.default for flag in FLAGS} | flags) == need


def test_a_search_that_shares_nothing_fits() -> None:
    assert default_pool_tokens(NEED, 4096, 57_344, PLENTY) == 65 * 1024


def test_no_trajectory_is_longer_than_the_context() -> None:
    assert default_pool_tokens(NEED, 600, 57_344, PLENTY) == 65 * 600


def test_memory_is_a_bound_down_to_one_trajectory() -> None:
    assert default_pool_tokens(NEED, 4096, 1000, 5_000_999) == 5000
    with pytest.raises(
        SystemExit, match=r"more than 1024 tokens \(0\.10 GB\) for one trajectory, .* holds 1024; lower"
    ):
        default_pool_tokens(NEED, 4096, 100_000, 102_400_000)


def test_a_pool_of_nothing_is_no_size() -> None:
    for tokens in (None, MIN_POOL_TOKENS):
        check_pool_tokens(tokens)
    for tokens in (0, -5, MIN_POOL_TOKENS - 1):
        with pytest.raises(SystemExit, match=f"must be at least {MIN_POOL_TOKENS}, got {tokens}; leave it out"):
            check_pool_tokens(tokens)


def test_a_cpu_keeps_memory_for_others() -> None:
    assert budget_bytes(40e9, is_host=False) == 10_000_000_000
    assert budget_bytes(8e9, is_host=True) == 1_000_000_000
    assert budget_bytes(1e12, is_host=True) == HOST_LIMIT_BYTES


def policy(**fields: Any) -> Any:
    return SimpleNamespace(
        **{
            "model_path": "policy", "trust_remote_code": True, "dtype": "bfloat16", "attention_backend": "triton",
            "enable_deterministic_inference": True, "random_seed": 5, "revision": "main", "quantization": "fp8",
            "context_length": 2000, **fields,
        }
    )  # fmt: skip


def test_the_prm_computes_as_deterministically_as_the_policy_model() -> None:
    for path in ("policy", "prm"):
        assert prm_arguments(policy(), path)["enable_deterministic_inference"] is True
        assert (
            prm_arguments(policy(enable_deterministic_inference=False), path)["enable_deterministic_inference"] is False
        )


@pytest.mark.parametrize(
    ("of_policy", "of_prm"), [("fa3", "fa3"), ("ets_tree", "triton"), ("trtllm_mla", None), ("dsa", None), (None, None)]
)
def test_the_prm_has_the_attention_of_the_policy_model_where_it_can(of_policy: str | None, of_prm: str | None) -> None:
    assert prm_arguments(policy(attention_backend=of_policy), "prm")["attention_backend"] == of_prm


def test_what_is_said_of_a_checkpoint_holds_for_the_same_one() -> None:
    shared, other = prm_arguments(policy(), "policy"), prm_arguments(policy(), "prm")
    assert {key: shared[key] for key in ("revision", "quantization", "context_length")} == {
        "revision": "main", "quantization": "fp8", "context_length": 2000,
    }  # fmt: skip
    assert not {"revision", "quantization", "context_length"} & set(other)
    assert (shared["load_format"], other["load_format"]) == ("dummy", "auto")
