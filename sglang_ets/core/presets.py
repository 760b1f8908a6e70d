"""Settings by one word: `paper` is everything as arXiv 2502.13575 and its code have it, `default` is ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Preset = Literal["default", "paper"]

# Coverage weight by width, as published (SqueezeAILab/ETS, hype-parameters/).
DIVERSITY_WEIGHTS = {16: 1.5, 64: 1.4, 256: 1.45}
PUBLISHED_COST_WEIGHT = 1.0
# Sampling parameters where the request gives none, over what sglang takes for a chat from the model's generation_config.json.
SAMPLING: Mapping[Preset, Mapping[str, float]] = MappingProxyType(
    {
        "default": MappingProxyType({}),
        "paper": MappingProxyType(
            {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        ),
    }
)
_PAPER = {
    "kv_cost_weight": PUBLISHED_COST_WEIGHT,
    "coverage": "uniform",
    "kv_cost": "nodes",
    "cluster_distance": 0.05,
    "center_embeddings": False,
    "rebase_temperature": 0.2,
    "max_tokens": 1024,
    "max_step_tokens": 256,
    "max_steps": 25,
    "answer": "weighted_majority",
    "score_aggregation": "last",
    "early_stop": "off",
}


def published_diversity_weight(width: int) -> float:
    """Of the nearest width that was published; the smaller of two."""
    return DIVERSITY_WEIGHTS[min(DIVERSITY_WEIGHTS, key=lambda known: (abs(known - width), known))]


def preset_values(preset: object, width: object) -> dict[str, Any]:
    """Field of `SearchConfig` -> what the preset sets. What is no preset or no width sets nothing."""
    if preset != "paper" or not isinstance(width, int):
        return {}
    return {**_PAPER, "diversity_weight": published_diversity_weight(width)}
