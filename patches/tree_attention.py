"""The attention backend `ets_tree`: its name among sglang's backends, and the hook that feeds it plans."""

from __future__ import annotations

from typing import Any

from sglang_ets.patches import uses
from sglang_ets.patches.record import Patch

from sglang_ets.core.attention_plan import TREE_BACKEND


def register() -> None:
    """Offer the backend by the ways that sglang has for it. Idempotent."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(TREE_BACKEND)(create)
    if TREE_BACKEND not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([TREE_BACKEND])


def create(model_runner: Any) -> Any:
    """Derived from sglang's backend, which is imported as late as sglang does it."""
    from sglang_ets.engine.tree_attention import TreeAttnBackend

    return TreeAttnBackend(model_runner)


def plan_attention(plan: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> Any:
    if scheduler.ets.plan_attention is not None:
        scheduler.ets.plan_attention(plan.batch_to_run)
    return plan


PATCHES: tuple[Patch, ...] = (
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run",
        kind="after",
        hook="sglang_ets.patches.tree_attention:plan_attention",
        parameters=("self",),
        tested=("a3f44f962b24c1c4",),
        why="the backend `ets_tree` learns which KV the rows of the next decode share",
        upstream="none: search inside the scheduler is new",
        remove_when="sglang's decode attention reads shared prefixes once",
        uses=uses.TREE_ATTENTION,
    ),
)
