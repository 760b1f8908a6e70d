"""What sglang's plugin loader calls: which patches are installed when, and what stops a process."""

from __future__ import annotations

import gc
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_ets import flags, patches, plugin
from sglang_ets.prm.policy_head import LinearHead

SETTINGS = {"search": "ets", "prm_model_path": "a-head", "prm_format": "judge"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the patches, in order."""
    asked: list[Any] = []
    monkeypatch.setattr(patches, "wanted", lambda search_is_on: ("patches", search_is_on))
    monkeypatch.setattr(patches, "install", lambda wanted, untested: asked.append(("install", wanted[1], untested)))
    monkeypatch.setattr(plugin, "allows_untested", lambda: False)
    monkeypatch.setattr(patches, "check_installed", lambda: asked.append("check"))
    monkeypatch.setattr(plugin, "_state", {"is_registered": False})
    monkeypatch.delenv(flags.SEARCH_ENV, raising=False)
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "apply_hooks", lambda: asked.append("apply"))
    return asked


@pytest.mark.parametrize(("search", "is_on"), [(None, False), ("off", False), ("ets", True)])
def test_the_environment_says_whether_a_process_searches(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, search: str | None, is_on: bool
) -> None:
    if search is not None:
        monkeypatch.setenv(flags.SEARCH_ENV, search)
    assert not plugin.is_registered()
    plugin.register()
    assert plugin.is_registered()
    assert calls == [("install", is_on, False)]


@pytest.mark.parametrize(("name", "is_child"), [("__mp_main__", True), ("sglang_ets.launch_server", False)])
def test_a_process_of_a_server_collects_no_garbage_until_it_is_registered(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, is_child: bool
) -> None:
    """And a script that imports the launcher is left as it is."""
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object() if is_child else None)
    try:
        runpy.run_module("sglang_ets.launch_server", run_name=name)
        assert gc.isenabled() is not is_child
        gc.disable()
        plugin.register()
        assert gc.isenabled() is is_child
    finally:
        gc.enable()


@pytest.mark.parametrize("runs_scheduler", [False, True])
def test_a_child_without_a_scheduler_is_not_patched(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, runs_scheduler: bool
) -> None:
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    if runs_scheduler:
        monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", SimpleNamespace())  # type: ignore[arg-type]
    else:
        monkeypatch.delitem(sys.modules, "sglang.srt.managers.scheduler", raising=False)
    plugin.register()
    assert calls == ([("install", False, False)] if runs_scheduler else [])


def test_flags_switch_the_search_on_for_this_process_and_its_children(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flags.SEARCH_ENV, "before")
    args = SimpleNamespace(_ets=SETTINGS)
    assert plugin.switch_on(args) is args
    assert calls == [("install", True, False), "apply", "check"]
    assert os.environ[flags.SEARCH_ENV] == "ets"


@pytest.mark.parametrize(
    ("prm_format", "given", "is_full", "expected"),
    [
        ("judge", None, False, None),
        ("policy_head", None, False, "last"),
        ("policy_head", "full", False, "full"),
        ("policy_head", None, True, None),  # sglang makes it full
    ],
)
def test_states_are_kept_for_a_head_that_reads_them(
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    prm_format: str,
    given: str | None,
    is_full: bool,
    expected: str | None,
) -> None:
    monkeypatch.setenv(flags.SEARCH_ENV, "before")
    LinearHead(np.zeros(4), 0.0).save(tmp_path)
    args = states_args(tmp_path, return_hidden_states_mode=given, enable_return_hidden_states=is_full)
    args._ets["prm_format"] = prm_format
    assert plugin.switch_on(args).return_hidden_states_mode == expected
    assert args.speculative_algorithm is None and not args.enable_return_aux_hidden_states


def states_args(folder: Path, **given: Any) -> SimpleNamespace:
    """Server arguments as parsed, of which none that has to do with hidden states is set but those given."""
    settings = {**SETTINGS, "prm_model_path": str(folder), "prm_format": "auto"}
    return SimpleNamespace(_ets=settings, **{**dict.fromkeys(plugin.OTHER_STATES), **given})


def test_states_of_an_inner_layer_come_by_sglangs_own_switch(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(flags.SEARCH_ENV, "before")
    LinearHead(np.zeros(4), 0.0, layer=3).save(tmp_path)
    args = plugin.switch_on(states_args(tmp_path))
    assert (args.enable_return_aux_hidden_states, args.return_aux_hidden_state_layer_ids) == (True, [2])
    assert (args.speculative_algorithm, args.return_hidden_states_mode) == ("EAGLE3", "last")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("return_hidden_states_mode", "full", "--return-hidden-states-mode beside layer 3"),
        ("enable_return_hidden_states", True, "--enable-return-hidden-states beside layer 3"),
        ("speculative_algorithm", "NGRAM", "--speculative-algorithm beside layer 3"),
    ],
)
def test_a_head_of_an_inner_layer_is_alone_in_reading_states(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: object, said: str
) -> None:
    monkeypatch.setenv(flags.SEARCH_ENV, "before")
    LinearHead(np.zeros(4), 0.0, layer=3).save(tmp_path)
    with pytest.raises(SystemExit, match=f"must be alone in reading hidden states, got {said}"):
        plugin.switch_on(states_args(tmp_path, **{name: value}))


def test_a_head_is_no_checkpoint_and_is_on_every_rank(tmp_path: Path) -> None:
    own = {**SETTINGS, "prm_format": "policy_head", "prm_model_path": str(tmp_path), "prm_tp": 3}
    args = SimpleNamespace(_ets=own, tp_size=2, model_path="none")
    with pytest.raises(SystemExit, match=r"reads policy_head\.safetensors in the folder of --prm-model-path"):
        plugin.check_prm(args)
    LinearHead(np.zeros(3), 0.0).save(tmp_path)
    plugin.check_prm(args)
    plugin.check_prm_ranks(args)
    with pytest.raises(SystemExit, match=r"in which no config\.json is found"):
        plugin.check_prm(SimpleNamespace(_ets={**SETTINGS, "prm_model_path": str(tmp_path)}))


def test_flags_that_leave_it_off_install_nothing(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flags.SEARCH_ENV, "before")
    plugin.switch_on(SimpleNamespace(_ets={"search": "off"}))
    assert calls == []
    assert os.environ[flags.SEARCH_ENV] == "off"


def test_a_scheduler_without_settings_takes_them_from_the_environment(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flags, "from_environment", lambda: {"search": "beam"})
    bare, given = SimpleNamespace(), SimpleNamespace(_ets={"search": "ets"})
    plugin.check_scheduler(bare)
    plugin.check_scheduler(given)
    assert (bare._ets, given._ets) == ({"search": "beam"}, {"search": "ets"})
    assert calls == ["check", "check"]


def test_a_scheduler_whose_hooks_are_missing_does_not_start(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise patches.PatchDrift("a hook is missing")

    monkeypatch.setattr(patches, "check_installed", missing)
    with pytest.raises(SystemExit, match="a hook is missing"):
        plugin.check_scheduler(SimpleNamespace(_ets={"search": "ets"}))


@pytest.mark.parametrize(("flag", "env", "allows"), [(False, "", False), (False, "1", True), (True, "0", True)])
def test_a_flag_or_the_environment_allows_an_untested_sglang(
    monkeypatch: pytest.MonkeyPatch, flag: bool, env: str, allows: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["server", *(["--allow-untested-sglang"] if flag else [])])
    monkeypatch.setenv(flags.ALLOW_UNTESTED.env, env)
    assert plugin.allows_untested() is allows
    assert os.environ[flags.ALLOW_UNTESTED.env] == ("1" if flag else env)  # for child processes


def resolved(monkeypatch: pytest.MonkeyPatch, search: str, **settings: Any) -> SimpleNamespace:
    from sglang.srt.arg_groups import model_override_base

    view = SimpleNamespace(
        **{
            "disable_radix_cache": True,
            "enable_deterministic_inference": False,
            "attention_backend": "flashinfer",
            **settings,
        }
    )
    monkeypatch.setattr(model_override_base, "resolved_view", lambda _args: view)
    return SimpleNamespace(_ets={"search": search})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {},
            "leave out --disable-radix-cache (deterministic inference keeps it with --attention-backend triton or fa3)",
        ),
        (
            {"enable_deterministic_inference": True},
            "switches the radix cache off with --attention-backend flashinfer, and a search cannot do without it; "
            "give --attention-backend triton or fa3",
        ),
    ],
)
def test_a_search_without_the_radix_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        plugin.check_radix_cache(resolved(monkeypatch, "ets", **settings))
    assert sentence in str(caught.value)


def test_a_prm_is_looked_at_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = {"search": "ets", "prm_model_path": str(tmp_path / "none"), "prm_format": "auto"}
    with pytest.raises(SystemExit, match="--prm-model-path must name a checkpoint"):
        plugin.check_prm(SimpleNamespace(_ets=settings))
    plugin.check_prm(SimpleNamespace(_ets={**settings, "search": "off"}))
    plugin.check_prm(SimpleNamespace(_ets={**settings, "prm_model_path": None}))
    plugin.check_prm(SimpleNamespace())


def test_without_search_or_with_the_radix_cache_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.check_radix_cache(resolved(monkeypatch, "off"))
    plugin.check_radix_cache(resolved(monkeypatch, "ets", disable_radix_cache=False))
    plugin.check_radix_cache(SimpleNamespace())  # arguments of sglang's own, or of the PRM
