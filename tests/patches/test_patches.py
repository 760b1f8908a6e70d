"""The patch set fits the installed sglang, and notices when it does not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_ets.patches import PATCHES, Patch, PatchDrift, is_applied, verify

from sglang_ets import patches

IDS = [f"{patch.kind} {patch.target.rsplit('.', 2)[-2]}.{patch.target.rsplit('.', 1)[-1]}" for patch in PATCHES]


@pytest.mark.parametrize("patch", PATCHES, ids=IDS)
def test_record_fits_the_installed_sglang(patch: Patch) -> None:
    assert patch.current_sha256() == patch.sha256
    assert callable(patch.resolve_hook())
    assert patch.why
    assert patch.remove_when
    assert patch.upstream.startswith(("https://", "none: "))


def test_no_hook_is_listed_twice() -> None:
    assert len({(patch.target, patch.hook) for patch in PATCHES}) == len(PATCHES)


def test_drift_stops_the_process_and_says_what_to_do() -> None:
    drifted = dataclasses.replace(PATCHES[0], sha256="0" * 64)
    with pytest.raises(PatchDrift) as caught:
        verify([*PATCHES[1:3], drifted])
    assert isinstance(caught.value, SystemExit)
    for part in (drifted.target, drifted.sha256, PATCHES[0].sha256, "What to do"):
        assert part in str(caught.value)


def test_a_target_that_is_gone_is_drift() -> None:
    with pytest.raises(PatchDrift, match="nothing"):
        verify([dataclasses.replace(PATCHES[0], target="sglang.srt.server_args.ServerArgs.no_such_method")])


def test_nothing_is_registered_when_one_target_drifted(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered: list[Any] = []
    monkeypatch.setattr(HookRegistry, "register", lambda *args, **kwargs: registered.append(args))
    with pytest.raises(PatchDrift):
        patches.install([*PATCHES, dataclasses.replace(PATCHES[-1], sha256="0" * 64)])
    assert registered == []


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


IN_A_PROCESS_OF_ITS_OWN = """
from sglang_ets import cpu_shim, patches
cpu_shim.install()
from sglang.srt.plugins.hook_registry import HookRegistry
assert not any(patches.is_applied(patch) for patch in patches.PATCHES)
patches.install(patches.PATCHES)
if {forget}:
    HookRegistry._hooks.pop(patches.PATCHES[5].target)
HookRegistry.apply_hooks()
patches.check_installed()
patches.install(patches.PATCHES)  # a second time changes nothing
assert all(patches.is_applied(patch) for patch in patches.PATCHES)
from sglang.srt.entrypoints.openai import protocol, serving_completions
assert serving_completions.CompletionRequest is protocol.CompletionRequest
assert protocol.CompletionRequest(prompt="a", search_width=4).search_width == 4
"""


@pytest.mark.parametrize("forget", [False, True])
def test_applied_hooks_are_seen_and_a_missing_one_ends_the_process(forget: bool) -> None:
    script = IN_A_PROCESS_OF_ITS_OWN.format(forget=forget)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == forget, done.stderr
    assert ("did not take effect" in done.stderr) == forget


def test_is_applied_sees_through_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = PATCHES[-1]
    assert not is_applied(patch)
    hook = patch.resolve_hook()

    def wrapper() -> object:
        return hook

    outer = SimpleNamespace(__wrapped__=wrapper)
    monkeypatch.setattr(Patch, "resolve_target", lambda _self: outer)
    assert is_applied(patch)
