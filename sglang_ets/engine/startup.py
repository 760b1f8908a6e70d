"""Builds the coordinator of a scheduler process from the server's flags."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sglang.srt.runtime_context import get_device

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.presets import DIVERSITY_WEIGHTS, SAMPLING
from sglang_ets.engine.coordinator import SearchCoordinator
from sglang_ets.engine.device_distances import step_distances, warm_up
from sglang_ets.kernels.dispatch import describe_backend
from sglang_ets.prm.choose import is_policy_head
from sglang_ets.prm.engine import PrmEngine, PrmSettings
from sglang_ets.prm.policy_head import PolicyHead
from sglang_ets.prm.ranks import current_ranks
from sglang_ets.prm.sizing import SIZED_WIDTH, PoolNeed
from sglang_ets.prm.steps import StepScorer

logger = logging.getLogger(__name__)


def make_coordinator(scheduler: Any) -> SearchCoordinator:
    """Load the PRM's weights and make the coordinator. Called once, while the scheduler starts."""
    flags = scheduler.server_args._ets
    device = get_device().device
    logger.info("%s", describe_backend(device))
    preset = SearchConfig.of_defaults(flags)
    if preset.preset_settings:
        logger.info("search preset %s: %s", preset.preset, preset_text(preset))
    prm = load_scorer(scheduler, flags)
    distances = step_distances(device)
    warm_up(distances)
    return SearchCoordinator(scheduler, prm, current_ranks(), distances=distances)


def load_scorer(scheduler: Any, flags: Mapping[str, Any]) -> StepScorer:
    """A second model with its weights, or a head on the states of the policy model."""
    if is_policy_head(flags["prm_model_path"], flags["prm_format"]):
        return PolicyHead.load(flags["prm_model_path"], scheduler, current_ranks())
    settings = PrmSettings(
        model_path=flags["prm_model_path"] or scheduler.server_args.model_path,
        need=pool_need(flags),
        format=flags["prm_format"],
        max_total_tokens=flags["prm_max_total_tokens"],
        num_ranks=flags["prm_tp"],
    )
    return PrmEngine.load(scheduler, settings)


def preset_text(config: SearchConfig) -> str:
    """What a server's preset sets, for its log; what depends on the width is that of each request."""
    shown = {
        **config.preset_settings,
        "diversity_weight": DIVERSITY_WEIGHTS,
        **SAMPLING[config.preset],
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def pool_need(flags: Mapping[str, Any]) -> PoolNeed:
    """What the flags say that a search may need of the PRM's pool."""
    defaults = SearchConfig.of_defaults(flags)
    trajectory = min(defaults.max_tokens, defaults.max_steps * defaults.max_step_tokens)
    return PoolNeed(min(flags["max_width"], SIZED_WIDTH), trajectory)
