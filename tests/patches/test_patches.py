"""The patch set fits the installed sglang, and a process stops when it does not."""

from __future__ import annotations

import ast
import dataclasses
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_ets.patches import PATCHES, Patch, PatchDrift, is_applied, verify
from sglang_ets.patches.record import Use
from sglang_ets.patches.sources import Sources

from sglang_ets import flags, patches, plugin

ROOT = Path(__file__).resolve().parents[2]
IDS = [f"{patch.kind} {patch.target.rsplit('.', 2)[-2]}.{patch.target.rsplit('.', 1)[-1]}" for patch in PATCHES]
USES = {use for patch in PATCHES for use in patch.uses}
INSTALLED = Sources.installed()
GATE = next(patch for patch in PATCHES if patch.target.endswith("handle_request"))


@pytest.fixture(autouse=True)
def parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sources, "installed", lambda: INSTALLED)


@pytest.mark.parametrize("patch", PATCHES, ids=IDS)
def test_record_fits_the_installed_sglang(patch: Patch) -> None:
    compared = patch.compare(INSTALLED)
    assert (compared.change, compared.breaks) == ("none", ())
    assert patch.live_break() is None
    assert callable(patch.resolve_hook())
    assert patch.why
    assert patch.remove_when
    assert patch.upstream.startswith(("https://", "none: "))


def test_no_hook_is_listed_twice() -> None:
    assert len({(patch.target, patch.hook) for patch in PATCHES}) == len(PATCHES)


def our_files() -> list[Path]:
    return [
        path for room in ("sglang_ets", "patches") for path in (ROOT / room).rglob("*.py") if path.name != "uses.py"
    ]


def test_contracts_name_no_attribute_that_our_code_does_not_have() -> None:
    words = {word for path in our_files() for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    places = {use.place: INSTALLED.find(use.place) for use in USES}
    named = {name for use in USES if (place := places[use.place]) is not None and place.is_class for name in use.names}
    assert named <= words


def test_all_that_our_code_imports_from_sglang_stands_in_a_contract() -> None:
    """The files that start or patch sglang aside: they are stopped by the import itself, before anything is served."""
    covered = {use.place for use in USES} | {patch.target for patch in PATCHES}
    imported = set()
    for path in our_files():
        if path.name not in ("launch_server.py", "plugin.py", "cpu_shim.py") and path.parent != ROOT / "patches":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                    imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert len(imported) > 30
    assert {name for name in imported if not any(_is_at_or_below(place, name) for place in covered)} == set()


def _is_at_or_below(place: str, name: str) -> bool:
    return place == name or place.startswith(f"{name}.")


def replaced(patch: Patch, **changes: Any) -> Patch:
    return dataclasses.replace(patch, **changes)


def test_all_broken_contracts_are_listed_before_anything_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered: list[Any] = []
    monkeypatch.setattr(HookRegistry, "register", lambda *args, **kwargs: registered.append(args))
    protocol = next(patch for patch in PATCHES if patch.kind == "replace")
    broken = [
        replaced(PATCHES[0], target="sglang.srt.server_args.ServerArgs.no_such_method"),
        replaced(GATE, parameters=("self", "request")),
        replaced(PATCHES[1], uses=(Use("sglang.srt.managers.schedule_batch.Req", ("rid", "wings")),)),
        replaced(PATCHES[1], uses=(Use("sglang.srt.mem_cache.common.release_kv_cache", ("req", "wings")),)),
        replaced(PATCHES[1], uses=(Use("sglang.srt.mem_cache.common.no_such_function"),)),
        replaced(protocol, adds=("n", "wings")),
    ]
    with pytest.raises(PatchDrift) as caught:
        patches.install([*PATCHES, *broken], allow_untested=True)
    assert isinstance(caught.value, SystemExit)
    for part in (
        "breaks 7 contracts",
        "ServerArgs.no_such_method is gone",
        "handle_request takes (self, request, raw_request), expected (self, request)",
        "schedule_batch.Req has no wings",
        "release_kv_cache takes no wings",
        "release_kv_cache requires tree_cache, checkpoint as well",
        "no_such_function is gone",
        f"{protocol.target} has n of its own",
        "What to do",
    ):
        assert part in str(caught.value)
    assert registered == []


def test_a_hook_before_or_after_states_the_first_parameters() -> None:
    batch = next(patch for patch in PATCHES if patch.hook.endswith(":after_batch"))
    assert batch.parameters == ("self", "batch", "result")
    verify([batch])
    with pytest.raises(PatchDrift, match=re.escape("expected first of all (self, result)")):
        verify([replaced(batch, parameters=("self", "result"))])


def test_untested_code_is_refused_with_the_remedy_or_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    untested = [replaced(GATE, tested=("0" * 16,)), replaced(PATCHES[1], tested=())]
    with pytest.raises(PatchDrift) as caught:
        verify([PATCHES[0], *untested])
    for part in ("2 targets", GATE.target, PATCHES[1].target, "--allow-untested-sglang", flags.ALLOW_UNTESTED.env):
        assert part in str(caught.value)
    assert PATCHES[0].target not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        verify([PATCHES[0], *untested], allow_untested=True)
    (line,) = caplog.messages
    assert GATE.target in line and "was not tested" in line
    caplog.clear()
    verify([replaced(GATE, tested=("0" * 16, *GATE.tested))])
    assert caplog.messages == []


def test_a_target_replaced_without_the_registry_is_a_broken_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase

    monkeypatch.setattr(OpenAIServingBase, "handle_request", lambda self, request, raw_request: None)
    with pytest.raises(PatchDrift, match=f"handle_request has been replaced by code of {__name__}"):
        verify([GATE], allow_untested=True)


@pytest.mark.parametrize(
    ("argv", "env", "is_allowed"),
    [([], None, False), (["--allow-untested-sglang"], None, True), ([], "1", True), ([], "0", False)],
)
def test_the_flag_is_seen_before_flags_are_parsed_and_reaches_the_children(
    argv: list[str], env: str | None, is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flags.ALLOW_UNTESTED.env, env or "")
    monkeypatch.setattr(sys, "argv", ["launch_server", *argv])
    assert plugin.allows_untested() is is_allowed
    assert flags.ALLOW_UNTESTED.from_environment() is is_allowed


def test_a_target_that_another_plugin_has_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_patched", {PATCHES[3].target})
    with pytest.raises(PatchDrift, match="another plugin"):
        patches.install([PATCHES[3]])


def test_search_off_wants_the_flags_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {patch.condition for patch in patches.wanted(search_is_on=False)} == {"loaded"}
    monkeypatch.setattr(patches, "is_cpu_engine", lambda: False)
    assert {patch.condition for patch in patches.wanted(search_is_on=True)} == {"loaded", "always"}
    monkeypatch.setattr(patches, "is_cpu_engine", lambda: True)
    assert patches.wanted(search_is_on=True) == PATCHES


def test_the_attention_of_the_cpu_can_be_had_without_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patches.CPU_ATTENTION_ENV, "1")
    monkeypatch.setattr(patches, "is_cpu_engine", lambda: True)
    assert {patch.condition for patch in patches.wanted(search_is_on=False)} == {"loaded", "cpu"}
    assert patches.wanted(search_is_on=False)[-2:] == patches.torch_native.PATCHES
    assert patches.wanted(search_is_on=True) == PATCHES
    monkeypatch.setattr(patches, "is_cpu_engine", lambda: False)
    assert {patch.condition for patch in patches.wanted(search_is_on=False)} == {"loaded"}


# One process for all of it: most of its time goes into the import of sglang's scheduler, less without garbage collection.
IN_A_PROCESS_OF_ITS_OWN = """
import dataclasses, gc, os, sys
gc.disable()
from sglang_ets import cpu_shim, patches, plugin
cpu_shim.install()
from sglang.srt.plugins.hook_registry import HookRegistry
assert not any(patches.is_applied(patch) for patch in patches.PATCHES)

sources = patches.Sources.installed()  # parsed once
patches.Sources.installed = lambda: sources
patches.PATCHES = tuple(dataclasses.replace(patch, tested=()) for patch in patches.PATCHES)
os.environ["SGLANG_ETS_SEARCH"] = "ets"
try:
    plugin.register()
except patches.PatchDrift as drift:
    print(drift)
assert not HookRegistry._hooks
sys.argv.append("--allow-untested-sglang")
plugin.register()

forgotten = patches.PATCHES[4].target
hooks = HookRegistry._hooks.pop(forgotten)
HookRegistry.apply_hooks()
try:
    patches.check_installed()
except patches.PatchDrift as drift:
    print(drift)
HookRegistry._hooks[forgotten] = hooks
HookRegistry.apply_hooks()
patches.check_installed()
plugin.register()  # a second time changes nothing
assert all(patches.is_applied(patch) for patch in patches.PATCHES)
from sglang.srt.entrypoints.openai import protocol, serving_completions
assert serving_completions.CompletionRequest is protocol.CompletionRequest
assert protocol.CompletionRequest(prompt="a", search_width=4).search_width == 4
print("all applied")
"""


def test_a_process_stops_at_untested_code_and_at_a_missing_hook_and_starts_with_the_flag() -> None:
    script = [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS_OF_ITS_OWN]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"start with --{flags.ALLOW_UNTESTED.name}" in done.stdout
    assert f"did not take effect on {PATCHES[4].target}" in done.stdout
    assert "was not tested; every contract" in done.stderr
    assert done.stdout.endswith("all applied\n")


def test_is_applied_sees_through_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = PATCHES[-1]
    assert not is_applied(patch)
    hook = patch.resolve_hook()

    def wrapper() -> object:
        return hook

    outer = SimpleNamespace(__wrapped__=wrapper)
    monkeypatch.setattr(Patch, "resolve_target", lambda _self: outer)
    assert is_applied(patch)
