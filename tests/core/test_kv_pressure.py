"""The weight of KV under pressure: smooth, monotone, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.kv_pressure import RELAXED_USAGE, pressure_factor, under_pressure


@given(first=st.floats(0, 1.2), second=st.floats(0, 1.2), strength=st.floats(0, 100))
def test_the_factor_never_falls_as_the_pool_fills(first: float, second: float, strength: float) -> None:
    low, high = sorted((first, second))
    assert 1.0 <= pressure_factor(low, strength) <= pressure_factor(high, strength) <= 1.0 + strength


@pytest.mark.parametrize(("usage", "factor"), [(0.0, 1.0), (RELAXED_USAGE, 1.0), (0.75, 2.0), (1.0, 3.0), (2.0, 3.0)])
def test_the_ends_and_the_middle(usage: float, factor: float) -> None:
    assert pressure_factor(usage, 2.0) == factor


@pytest.mark.parametrize("algorithm", ["ets", "ets_kv"])
def test_only_the_weight_of_kv_changes(algorithm: str) -> None:
    config = SearchConfig(algorithm=algorithm, width=16)  # type: ignore[arg-type]
    pressed = under_pressure(config, 1.0, 2.0)
    assert pressed.weights.kv_cost_weight == 3 * config.weights.kv_cost_weight
    assert pressed.weights.diversity_weight == config.weights.diversity_weight
    assert replace(pressed, kv_cost_weight=None, diversity_weight=None) == config


def test_without_pressure_or_an_integer_program_the_settings_are_the_same_object() -> None:
    config = SearchConfig(algorithm="ets")
    assert under_pressure(config, 1.0, 0.0) is config
    assert under_pressure(config, 0.3, 5.0) is config
    rebase = SearchConfig(algorithm="rebase")
    assert under_pressure(rebase, 1.0, 5.0) is rebase
