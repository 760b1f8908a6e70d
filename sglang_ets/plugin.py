"""The entry point through which sglang loads us, in every process of a server, before anything is served.

Without search only the flags are added. With it, the whole patch set is verified and installed; any doubt ends the
process, because sglang would otherwise log the failure and serve without search.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Mapping
from typing import Any

from sglang_ets import flags, patches
from sglang_ets.patches import tree_attention
from sglang_ets.prm.choose import is_policy_head
from sglang_ets.prm.split import num_prm_ranks

# With these, hidden states mean something else than those of a head's inner layer.
OTHER_STATES = (
    "return_hidden_states_mode",
    "enable_return_hidden_states",
    "enable_return_aux_hidden_states",
    "speculative_algorithm",
)
_state = {"is_registered": False}


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`.

    Raises:
        PatchDrift: the installed sglang does not keep what the patches rely on, or is untested and that is not allowed.
        SystemExit: a policy of `--search-policy` cannot be loaded.
    """
    _state["is_registered"] = True
    if _is_child():
        gc.enable()  # after the imports: see the launcher
    flags.load_policies(sys.argv)
    if _needs_no_patches():
        return
    tree_attention.register()
    search_is_on = os.environ.get(flags.SEARCH_ENV, flags.OFF) != flags.OFF
    patches.install(patches.wanted(search_is_on), allows_untested())


def allows_untested() -> bool:
    """Whether code of an untested sglang is a warning. Hooks are needed to parse the flags, so this one is looked for."""
    if f"--{flags.ALLOW_UNTESTED.name}" in sys.argv:
        os.environ[flags.ALLOW_UNTESTED.env] = "1"  # for child processes
    return bool(flags.ALLOW_UNTESTED.from_environment())


def is_registered() -> bool:
    """Whether sglang has loaded us in this process."""
    return _state["is_registered"]


def switch_on(server_args: Any) -> Any:
    """Called when the flags are parsed: install what the search needs and tell the child processes.

    Returns:
        The same server arguments.

    Raises:
        PatchDrift: see `register`; or a hook did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    os.environ[flags.SEARCH_ENV] = server_args._ets["search"]
    if flags.is_on(server_args._ets):
        patches.install(patches.wanted(search_is_on=True), allows_untested())
        HookRegistry.apply_hooks()
        patches.check_installed()
        if has_policy_head(server_args._ets):
            keep_states(server_args)
    return server_args


def keep_states(server_args: Any) -> None:
    """Forward passes hand out the states that a policy head reads: CUDA graphs are captured with them, or never have them.

    States of an inner layer come by sglang's own switch for them, which puts them in place of the last ones.

    Raises:
        SystemExit: see `LinearHead.load`; or a request could ask for the last ones.
    """
    from sglang_ets.prm.policy_head import LinearHead

    path = server_args._ets["prm_model_path"]
    layer = LinearHead.load(path).layer if path else None
    if layer is not None:
        wanted = {name: getattr(server_args, name) for name in OTHER_STATES}
        if given := [f"--{name.replace('_', '-')}" for name, value in wanted.items() if value not in (None, False)]:
            raise SystemExit(
                f"a policy head of an inner layer must be alone in reading hidden states, got {given[0]} beside layer {layer}; "
                "leave it out, or learn a head of the last states (prm_head --layers)"
            )
        server_args.enable_return_aux_hidden_states = True
        server_args.speculative_algorithm = "EAGLE3"  # names the convention of layers; sglang then resets it
        server_args.return_aux_hidden_state_layer_ids = [layer - 1]
    if server_args.return_hidden_states_mode is None and not server_args.enable_return_hidden_states:
        server_args.return_hidden_states_mode = "last"


def check_radix_cache(server_args: Any) -> None:
    """When sglang has filled in all arguments, before anything is loaded: a search shares its KV through the radix cache.

    Raises:
        SystemExit: a flag has switched the cache off.
    """
    from sglang.srt.arg_groups.model_override_base import resolved_view

    settings = resolved_view(server_args)
    if not flags.is_on(getattr(server_args, "_ets", None)) or not settings.disable_radix_cache:
        return
    if settings.enable_deterministic_inference:
        raise SystemExit(
            "--enable-deterministic-inference switches the radix cache off with --attention-backend "
            f"{settings.attention_backend}, and a search cannot do without it; give --attention-backend triton or fa3"
        )
    raise SystemExit(
        "--search cannot do without the radix cache, which is switched off; leave out --disable-radix-cache (deterministic "
        "inference keeps it with --attention-backend triton or fa3) and what implies it, or give --search off"
    )


def check_prm(server_args: Any) -> None:
    """At the same moment: the PRM is there, and of the kind that its format reads.

    Raises:
        SystemExit: see `check_checkpoint` and `LinearHead.load`.
    """
    from sglang_ets.prm.choose import check_checkpoint
    from sglang_ets.prm.policy_head import LinearHead

    settings: dict[str, Any] = getattr(server_args, "_ets", None) or {}
    if not flags.is_on(settings) or not settings["prm_model_path"]:
        return
    if has_policy_head(settings):
        LinearHead.load(settings["prm_model_path"])
    else:
        check_checkpoint(settings["prm_model_path"], settings["prm_format"])


def has_policy_head(settings: Mapping[str, Any]) -> bool:
    """Whether the PRM of these flags reads the policy model's own hidden states."""
    return flags.is_on(settings) and is_policy_head(settings["prm_model_path"], settings["prm_format"])


def check_prm_ranks(server_args: Any) -> None:
    """At the same moment: the PRM can be on as many ranks as --prm-tp says.

    Raises:
        SystemExit: it cannot.
    """
    settings: dict[str, Any] = getattr(server_args, "_ets", None) or {}
    if flags.is_on(settings) and not has_policy_head(settings):
        own = settings["prm_model_path"]
        policy = server_args.model_path
        num_prm_ranks(policy if own is None else own, policy, server_args.tp_size, settings["prm_tp"])


def check_scheduler(server_args: Any) -> None:
    """Before a scheduler is built: settings are there, and every hook has taken effect in this process.

    Raises:
        PatchDrift: a hook is missing.
        SystemExit: the settings are wrong.
    """
    if getattr(server_args, "_ets", None) is None:
        server_args._ets = flags.from_environment()
    patches.check_installed()


def _needs_no_patches() -> bool:
    """Detokenizer and data-parallel controller: children that run no scheduler and parse no flags."""
    return _is_child() and "sglang.srt.managers.scheduler" not in sys.modules


def _is_child() -> bool:
    return multiprocessing.parent_process() is not None
