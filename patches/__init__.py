"""The patch set: everything in which a server with search differs from stock sglang, in one ordered list."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from sglang_ets.patches import (
    cpu_sampler,
    guards,
    openai_api,
    scheduler,
    server_args,
    server_info,
    torch_native,
    tree_attention,
)
from sglang_ets.patches.messages import PatchDrift, broken_message, untested_message, untested_warning
from sglang_ets.patches.record import Kind, Patch
from sglang_ets.patches.sources import Sources

logger = logging.getLogger(__name__)

PATCHES: tuple[Patch, ...] = (
    *server_args.PATCHES,
    *openai_api.PATCHES,
    *scheduler.PATCHES,
    *server_info.PATCHES,
    *guards.PATCHES,
    *tree_attention.PATCHES,
    *torch_native.PATCHES,
    *cpu_sampler.PATCHES,
)
CPU_ATTENTION_ENV = "SGLANG_ETS_CPU_ATTENTION"  # 1: the attention of the CPU without the search, too
_installed: list[Patch] = []


def wanted(search_is_on: bool) -> tuple[Patch, ...]:
    """The patches that this process needs, in the order of the list."""
    conditions = {"loaded"}
    if search_is_on:
        conditions |= {"always"} | ({"cpu"} if is_cpu_engine() else set())
    found = tuple(patch for patch in PATCHES if patch.condition in conditions)
    if not search_is_on and os.environ.get(CPU_ATTENTION_ENV) == "1" and is_cpu_engine():
        found += torch_native.PATCHES
    return found


def is_cpu_engine() -> bool:
    """Whether sglang runs on the CPU in this process."""
    import torch

    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or not torch.cuda.is_available()


def verify(patches: Iterable[Patch], allow_untested: bool = False) -> None:
    """Hold every record against the installed sglang, before anything is patched.

    Raises:
        PatchDrift: contracts are broken, all of which it lists; or the code is of no tested version and that is not allowed.
    """
    sources = Sources.installed()
    compared = [patch.compare(sources) for patch in patches]
    broken = [line for one in compared for line in one.breaks]
    broken += [line for one in compared if one.code_hash and (line := one.patch.live_break())]
    if broken:
        raise PatchDrift(broken_message(broken))
    untested = [one.patch.target for one in compared if one.change == "text"]
    if untested and not allow_untested:
        raise PatchDrift(untested_message(untested))
    if untested:
        logger.warning("%s", untested_warning(untested))


def install(patches: Iterable[Patch], allow_untested: bool = False) -> None:
    """Verify all, then hand each hook to sglang's registry. sglang applies them when all plugins are loaded.

    Raises:
        PatchDrift: see `verify`; or another plugin stands at a target already, so that our hook would be lost.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    missing = [patch for patch in patches if patch not in _installed]
    verify(missing, allow_untested)
    for patch in missing:
        if patch.target in HookRegistry._patched:
            raise PatchDrift(
                f"sglang-ets: another plugin has patched {patch.target} before search was switched on; "
                "set SGLANG_ETS_SEARCH in the environment, or leave that plugin out of SGLANG_PLUGINS."
            )
    for patch in missing:
        HookRegistry.register(patch.target, patch.resolve_hook(), HookType(patch.kind))
    _installed.extend(missing)


def check_installed() -> None:
    """See that each installed hook really stands at its target: the registry only logs a hook that it cannot apply.

    Raises:
        PatchDrift: a hook is missing.
    """
    for patch in _installed:
        if not is_applied(patch):
            raise PatchDrift(
                f"sglang-ets: the hook {patch.hook} did not take effect on {patch.target}; "
                "search would not work, so the server stops. The reason stands further up in the log."
            )
    logger.info("sglang-ets: %d patches in effect", len(_installed))


def in_effect() -> list[str]:
    """What this process has patched: kind and target of each hook, in the order of the list."""
    return [f"{patch.kind} {patch.target.removeprefix('sglang.srt.')}" for patch in PATCHES if patch in _installed]


def is_applied(patch: Patch) -> bool:
    """Whether the patch's hook is in the chain of wrappers at its target."""
    hook, found = patch.resolve_hook(), patch.resolve_target()
    if isinstance(hook, type):
        return found is hook
    return any(_calls(wrapper, hook) for wrapper in _wrappers(getattr(found, "__func__", found)))


def _wrappers(function: Any) -> Iterable[Callable[..., Any]]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _calls(wrapper: Callable[..., Any], hook: Any) -> bool:
    return any(cell.cell_contents is hook for cell in getattr(wrapper, "__closure__", None) or ())


__all__ = [
    "PATCHES",
    "Kind",
    "Patch",
    "PatchDrift",
    "check_installed",
    "in_effect",
    "install",
    "verify",
    "wanted",
]
