"""The profile of a search: whose a sample is, and the report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import forks, profile
from bench.client_search.processes import Running
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
        (f"{ATTEND};_plan (sglang_ets/core/attention_plan.py:1)", "planning of the attention"),
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
    text = report(folded, [2.0, 4.0])
    assert "seconds each (mean): 3.00" in text
    assert "75.0%  sglang's scheduler" in text
    assert "25.0%  SearchCoordinator.after_batch (sglang_ets/engine/coordinator.py)" in text


def test_problems_are_solved_while_the_profile_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def grow(_client: Any, prompt: str, width: int, settings: dict[str, Any], **fields: Any) -> Any:
        asked.append((prompt, width, settings["algorithm"], fields["is_chat"]))
        return SimpleNamespace(usage=SimpleNamespace(completion_tokens=1), search={})

    def record(_process: Any, _seconds: int, out: Path) -> None:
        while len(asked) < 4:
            time.sleep(0.001)
        out.write_text("stacks")

    monkeypatch.setattr(forks, "grow", grow)
    monkeypatch.setattr(profile, "record", record)
    scheduler: Any = SimpleNamespace(name=lambda: profile.SCHEDULER[:15], send_signal=lambda _number: None)
    args = argparse.Namespace(policy="ets b=4", width=8, seed=0, in_flight=2, seconds=1)
    folded, latencies_s = profile.measure(Running("http://127.0.0.1:1", (scheduler,)), args)
    assert (folded, len(latencies_s)) == ("stacks", len(asked) - 1)
    assert {one[1:] for one in asked} == {(8, "ets", False)}
    assert len({prompt for prompt, *_ in asked[:4]}) == 4
