"""The profile of a search: whose a sample is, and the report."""

from __future__ import annotations

import pytest

from bench.profile import OTHER, OWN, SCHEDULER_CODE, area_of, report, samples

LOOP = (
    "event_loop_normal (scheduler.py:9);run_strands (patches/scheduler.py:1);run_batch (sglang_ets/engine/strands.py:2)"
)
RUN = f"{LOOP};Scheduler.run_batch (scheduler.py:3)"
FORWARD = f"{RUN};ModelRunner.forward (model_runner.py:1)"
ATTEND = f"{FORWARD};attend (patches/torch_native.py:7)"
COORDINATOR = "SearchCoordinator.after_batch (sglang_ets/engine/coordinator.py:1)"
AFTER = f"loop (scheduler.py:9);after_batch (patches/scheduler.py:5);{COORDINATOR}"


@pytest.mark.parametrize(
    ("stack", "area"),
    [
        (f"{FORWARD};LlamaModel.forward (llama.py:7)", "the policy model without attention"),
        (ATTEND, "attention over the tree"),
        (
            f"{ATTEND};_plan (sglang_ets/core/attention_plan.py:1)",
            "planning of the attention",
        ),
        (f"{RUN};ModelRunner.sample (model_runner.py:1);Draw.sample (sglang_ets/engine/strands.py:6)", "sampling"),
        (f"{RUN};ForwardBatch.init_new (forward_batch_info.py:1)", SCHEDULER_CODE),
        (
            f"{AFTER};PrmEngine.score (sglang_ets/prm/engine.py:1);ModelRunner.forward (model_runner.py:1)",
            "the PRM: forward passes and readout",
        ),
        (f"{AFTER};Strands.part (sglang_ets/engine/strands.py:4);UnifiedRadixCache.checkpoint (unified_radix_cache.py:1)", OWN),
        ("Thread.run (threading.py:1)", OTHER),
    ],
)  # fmt: skip
def test_a_sample_belongs_to_one_area(stack: str, area: str) -> None:
    assert area_of(stack) == area


def test_the_report_has_shares_of_the_main_thread_alone() -> None:
    folded = f"thread (1): MainThread;{RUN} 30\nthread (1): MainThread;{AFTER} 10\nthread (2): worker;{AFTER} 500\n"
    assert {thread: stacks.total() for thread, stacks in samples(folded).items()} == {
        "thread (1): MainThread": 40,
        "thread (2): worker": 500,
    }
    text = report(folded, [{"latency_s": 2.0}, {"latency_s": 4.0}])
    assert "seconds each (mean): 3.00" in text
    assert "75.0%  sglang's scheduler" in text
    assert "25.0%  SearchCoordinator.after_batch (sglang_ets/engine/coordinator.py)" in text
