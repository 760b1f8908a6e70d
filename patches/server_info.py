"""Hooks on a scheduler's start and on what `/server_info` tells."""

from __future__ import annotations

from typing import Any

from sglang_ets.patches.record import Patch

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
INTERNAL_STATE = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"


def check_before_start(_scheduler: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    from sglang_ets.plugin import check_scheduler

    check_scheduler(server_args)


def add_search_state(result: Any, controller: Any, *_args: Any, **_kwargs: Any) -> Any:
    from sglang_ets.patches import in_effect

    result.internal_state["search"] = {**controller.scheduler.ets.describe(), "patches": in_effect()}
    return result


PATCHES: tuple[Patch, ...] = (
    Patch(
        f"{SCHEDULER}.__init__",
        "before",
        "sglang_ets.patches.server_info:check_before_start",
        "a4a5297acc175a1e447ef64d90243a352db0a1eb5334e58b25e173d1f86ff202",
        "sglang only logs a hook that it cannot apply; a scheduler without its hooks must not start",
        "none: not asked for yet",
        "sglang stops when a plugin fails",
    ),
    Patch(
        f"{INTERNAL_STATE}.get_internal_state",
        "after",
        "sglang_ets.patches.server_info:add_search_state",
        "f01b8205456841227be61ec37cf42654fee9a26c1dfea6a55eb93d8bca9ebde4",
        "an operator sees live searches and the KV they hold",
        "none: search inside the scheduler is new",
        "sglang offers an extension point for internal state",
    ),
)
