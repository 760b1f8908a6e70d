"""The coordinator of a scheduler process is made of the server's flags."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ets.core.clusters import cosine_distances
from sglang_ets.engine import startup
from sglang_ets.engine.metrics import NoMetrics
from sglang_ets.prm import ranks
from sglang_ets.prm.engine import PrmEngine, PrmSettings
from sglang_ets.prm.sizing import SIZED_WIDTH, PoolNeed

FLAGS = {
    "prm_model_path": "/prm",
    "prm_format": "shepherd",
    "prm_max_total_tokens": 77,
    "prm_tp": 1,
    "algorithm": "dvts",
    "max_width": 32,
    "max_tokens": 300,
    "max_steps": 5,
    "max_step_tokens": 40,
}
GROUP = SimpleNamespace(rank=0, ranks=[0, 1, 2], cpu_group=None)  # of three tensor-parallel ranks
NEED = PoolNeed(32, 5 * 40)  # the widest search, and the longest trajectory that its steps allow


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[PrmSettings]:
    """Settings of the PRMs that were loaded."""
    calls: list[PrmSettings] = []

    def load(_cls: type, _scheduler: Any, settings: PrmSettings) -> str:
        calls.append(settings)
        return "the PRM"

    monkeypatch.setattr(PrmEngine, "load", classmethod(load))
    monkeypatch.setattr(startup, "get_device", lambda: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(tp_size=3, tp_group=GROUP))
    monkeypatch.setattr(ranks, "broadcast_pyobj", lambda values, *_group, **_source: values)
    return calls


def scheduler(**flags: Any) -> Any:
    return SimpleNamespace(
        server_args=SimpleNamespace(_ets={**FLAGS, **flags}, model_path="/policy"),
        metrics_collector_context=SimpleNamespace(current_scheduler_metrics_enabled=False),
    )


def test_flags_reach_the_prm_and_the_coordinator(loaded: list[PrmSettings]) -> None:
    made = startup.make_coordinator(scheduler())
    assert loaded == [PrmSettings("/prm", NEED, "shepherd", 77, 1)]
    assert made.prm == "the PRM"  # type: ignore[comparison-overlap]
    assert made.searches == {}
    assert made._decisions._ranks._group is GROUP  # type: ignore[attr-defined]
    assert made._defaults["algorithm"] == "dvts"
    assert isinstance(made._metrics, NoMetrics)
    assert made._distances is cosine_distances  # beside a CPU engine


def test_without_a_prm_the_policy_model_scores(loaded: list[PrmSettings]) -> None:
    startup.make_coordinator(
        scheduler(prm_model_path=None, prm_format="confidence", prm_max_total_tokens=None, prm_tp=None)
    )
    assert loaded == [PrmSettings("/policy", NEED, "confidence", None)]


def test_a_wrong_default_stops_the_start(loaded: list[PrmSettings]) -> None:
    with pytest.raises(ValueError, match="algorithm must be one of"):
        startup.make_coordinator(scheduler(algorithm="mcts"))


def test_where_the_models_run_decides_who_computes_distances(
    loaded: list[PrmSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def distances(device: torch.device | str) -> Any:
        asked.append(device)
        return cosine_distances

    monkeypatch.setattr(startup, "step_distances", distances)
    startup.make_coordinator(scheduler())
    assert asked == ["cpu"]


def test_the_pool_is_sized_for_what_the_flags_allow() -> None:
    assert startup.pool_need(FLAGS) == NEED
    assert startup.pool_need({**FLAGS, "max_tokens": 150}).trajectory_tokens == 150
    assert startup.pool_need({**FLAGS, "max_width": 1024}).width == SIZED_WIDTH


def test_a_preset_is_named_at_the_start_with_all_that_it_sets(
    loaded: list[PrmSettings], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        startup.make_coordinator(scheduler(preset="paper", max_steps=9))
        startup.make_coordinator(scheduler())
    (line,) = [record.getMessage() for record in caplog.records if "preset" in record.getMessage()]
    assert line.startswith("search preset paper: kv_cost_weight 1.0, coverage uniform, kv_cost nodes, ")
    assert "max_steps 9" in line and "diversity_weight {16: 1.5, 64: 1.4, 256: 1.45}, temperature 1.0" in line
