"""Flags, environment and the launcher's own choices."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from sglang_ets import flags
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.settings import settings_of
from sglang_ets.launch_server import EMBEDDED, EMBEDDED_WEIGHTS, chosen_flags, is_given


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    flags.add_flags(parser)  # sglang may build on a parser that has them
    return flags.from_namespace(parser.parse_args(argv))


def test_search_is_off_unless_asked_for() -> None:
    assert not flags.is_on(parsed())
    assert not flags.is_on(None)
    assert flags.is_on(parsed("--search", "rebase", "--prm-model-path", "p"))


def test_flags_become_defaults_of_requests() -> None:
    settings = parsed(
        "--search", "ets_kv", "--prm-model-path", "p", "--search-step-delimiter", r"\n", "--search-max-steps", "7"
    )
    config = SearchConfig.from_request(8, {"max_steps": 3}, settings, n=None, max_tokens=None, seed=None)
    assert (config.algorithm, config.step_delimiter, config.max_steps) == ("ets_kv", ("\n",), 3)
    config = SearchConfig.from_request(8, None, settings, n=None, max_tokens=None, seed=None)
    assert config.max_steps == 7


def test_environment_gives_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ETS_SEARCH", "beam")
    monkeypatch.setenv("SGLANG_ETS_PRM_MODEL_PATH", "p")
    monkeypatch.setenv("SGLANG_ETS_MAX_STEPS", "9")
    settings = flags.from_environment()
    assert (settings["algorithm"], settings["prm_model_path"], settings["max_steps"]) == ("beam", "p", 9)
    assert parsed("--search", "dvts")["algorithm"] == "dvts"


@pytest.mark.parametrize(
    ("text", "is_on"), [(None, False), ("1", True), ("Yes", True), ("0", False), ("off", False), ("", False)]
)
def test_a_switch_takes_no_value_and_reads_the_environment(
    text: str | None, is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        monkeypatch.setenv("SGLANG_ETS_TRACE", text)
    assert parsed()["trace"] is is_on
    assert parsed("--search-trace")["trace"] is True
    assert flags.from_environment()["trace"] is is_on


@pytest.mark.parametrize("name", ["SGLANG_ETS_TRACE", "SGLANG_ETS_SPECULATE"])
def test_a_switch_that_is_neither_on_nor_off_ends_the_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(SystemExit, match=f"{name} must be 1 or 0, got 'maybe'; leave it out for 0"):
        parsed()


def test_help_says_what_a_flag_takes() -> None:
    """No values for a switch, and one text where a request may give several."""
    shown = {flag.name: flag.help for flag in flags.FLAGS}
    assert "Values" not in shown["search-speculate"]
    assert "Values: 1 to 1024." in shown["search-max-steps"]
    assert r"One text, with \n for a newline" in shown["search-step-delimiter"]


def test_live_pages_need_one_tokenizer_process() -> None:
    values = argparse.Namespace(search="off", search_trace=True, tokenizer_worker_num=2)
    with pytest.raises(SystemExit, match=r"--tokenizer-worker-num 1, .* got 2; leave one of both out"):
        flags.from_namespace(values)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--search", "ets"], "--prm-model-path"),
        (["--search", "bean"], "--search must be one of best_of_n, .* got 'bean'; choose one of these names"),
        (["--search", "ets", "--prm-format", "x"], "--prm-format must be one of auto, .* got 'x'; choose one"),
        (
            ["--search", "ets", "--prm-model-path", "p", "--search-max-width", "1"],
            "--search-max-width must be from 2 to 1024, got 1; leave it out for 1024",
        ),
        (
            ["--search", "ets", "--prm-model-path", "p", "--search-kv-pressure", "-1"],
            "--search-kv-pressure must be from 0 to 1000, got -1.0; leave it out for 0",
        ),
        (
            ["--search", "ets", "--prm-model-path", "p", "--search-max-running", "0"],
            "--search-max-running must be at least 1, got 0; leave it out for the default",
        ),
        (["--search", "ets", "--prm-model-path", "p", "--search-max-steps", "0"], "max_steps"),
        (["--search", "ets", "--prm-model-path", "p", "--search-answer-pattern", "("], "answer_pattern"),
    ],
)
def test_wrong_flags_end_the_launch_with_a_sentence(argv: list[str], named: str) -> None:
    with pytest.raises(SystemExit, match=named):
        parsed(*argv)


def test_every_search_flag_is_a_setting_that_a_search_reads() -> None:
    own = {flag.key for flag in flags.SERVER_FLAGS}
    settings = {item.name for item in settings_of(SearchConfig)}
    assert own.isdisjoint(settings), "a flag of both kinds would be parsed twice"
    assert {flag.key for flag in flags.FLAGS} - own == {i.name for i in settings_of(SearchConfig) if i.flag_name}


def test_what_the_launcher_sets_for_the_embedded_task_stands_in_the_table() -> None:
    settings = {f"--{item.flag_name}": item for item in settings_of(SearchConfig) if item.flag_name}
    for flag, value in {**EMBEDDED, **EMBEDDED_WEIGHTS}.items():
        if flag.startswith("--search-"):
            text = settings[flag].default_text.partition("embedded task ")[2]
            assert text.startswith((f"`{value}`", f'`"{value}"`')), flag


def test_launcher_adds_only_what_is_not_given() -> None:
    assert chosen_flags(["--model-path", "m", "--search", "beam"], has_cuda=True) == []
    chosen = chosen_flags([], has_cuda=False)
    assert chosen[chosen.index("--model-path") + 1] == EMBEDDED["--model-path"]
    assert {"--device", "--dtype", "--max-total-tokens", "--search"} <= set(chosen)
    assert "--dtype" not in chosen_flags(["--dtype=bfloat16"], has_cuda=False)
    assert "--device" not in chosen_flags([], has_cuda=True)
    assert set(EMBEDDED_WEIGHTS) <= set(chosen), "chosen on this task, with its PRM"
    for paper in (["--search-preset", "paper"], ["--search-preset=default", "--search-preset=paper"]):
        assert set(EMBEDDED_WEIGHTS).isdisjoint(chosen_flags(paper, has_cuda=False))
    for ours in (["--search-preset", "default"], ["--search-preset=default"]):
        assert set(EMBEDDED_WEIGHTS) <= set(chosen_flags(ours, has_cuda=False)), "the default, said aloud"


@pytest.mark.parametrize(
    ("argv", "given"), [(["--model", "m"], True), (["--model-path=m"], True), (["--models"], False)]
)
def test_is_given(argv: list[str], given: bool) -> None:
    assert is_given(argv, "--model-path") is given
