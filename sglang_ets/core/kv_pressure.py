"""A full server prunes harder: the weight of KV rises smoothly as searches fill the pool."""

from __future__ import annotations

from dataclasses import replace

from sglang_ets.core.config import MAX_WEIGHT, SearchConfig

RELAXED_USAGE = 0.5  # of the pool; below it a search is left as it asked to be


def pressure_factor(usage: float, strength: float) -> float:
    """What the weight of KV is multiplied by: 1 up to `RELAXED_USAGE`, `1 + strength` at a full pool, smooth between.

    `usage` is the share of the pool that all searches together hold, 0..1.
    """
    place = min(1.0, max(0.0, (usage - RELAXED_USAGE) / (1.0 - RELAXED_USAGE)))
    return 1.0 + strength * place * place * (3.0 - 2.0 * place)


def under_pressure(config: SearchConfig, usage: float, strength: float) -> SearchConfig:
    """The settings by which a level is decided at this usage; the very same settings where nothing changes."""
    factor = pressure_factor(usage, strength)
    if factor == 1.0 or not config.is_solved:
        return config
    weights = config.weights
    return replace(
        config,
        kv_cost_weight=min(MAX_WEIGHT, weights.kv_cost_weight * factor),
        diversity_weight=weights.diversity_weight,  # or it would follow
    )
