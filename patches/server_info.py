"""Hooks on a scheduler's start and on what `/server_info` tells."""

from __future__ import annotations

from typing import Any

from sglang_ets.patches.record import Patch, Use

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
        target=f"{SCHEDULER}.__init__",
        kind="before",
        hook="sglang_ets.patches.server_info:check_before_start",
        parameters=("self", "server_args"),
        tested=("905dcf97d9439696",),
        why="sglang only logs a hook that it cannot apply; a scheduler without its hooks must not start",
        upstream="none: not asked for yet",
        remove_when="sglang stops when a plugin fails",
    ),
    Patch(
        target=f"{INTERNAL_STATE}.get_internal_state",
        kind="after",
        hook="sglang_ets.patches.server_info:add_search_state",
        parameters=("self",),
        tested=("1e054f6d1303e8f8",),
        why="an operator sees live searches and the KV they hold",
        upstream="none: search inside the scheduler is new",
        remove_when="sglang offers an extension point for internal state",
        uses=(
            Use(INTERNAL_STATE, ("scheduler",)),
            Use("sglang.srt.managers.io_struct.GetInternalStateReqOutput", ("internal_state",)),
        ),
    ),
)
