"""A setting is one edit: a field that is added to the class stands in every place that reads the list."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from sglang_ets import flags
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.settings import markdown_table, setting, settings_of, shown

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class LongerConfig(SearchConfig):
    """With settings of every kind that a new one may have."""

    patience: int = setting(3, "levels to wait", low=1, high=9, unit="levels", has_flag=True)
    slack: float | None = setting(None, "how far to go", low=0.0)
    mood: Literal["calm", "bold"] = setting("calm", "how to choose", has_flag=True)
    is_loud: bool = setting(False, "say more")
    motto: str = setting("on", "what to say")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patience": 10}, "patience must be an integer from 1 to 9, got 10; "),
        ({"patience": None}, "patience must be an integer from 1 to 9, got None; "),
        ({"slack": -1}, "slack must be a number from 0 to 1.79769e+308, got -1; "),
        ({"slack": float("inf")}, "slack must be a number"),
        ({"mood": "sad"}, "mood must be one of calm, bold, got 'sad'; "),
        ({"is_loud": 0}, "is_loud must be true or false, got 0; "),
        ({"motto": 5}, "motto must be text, got 5; "),
    ],
)
def test_the_rule_of_a_new_setting_holds(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        LongerConfig(**fields)


def test_a_new_setting_is_read_from_requests_text_and_the_servers_defaults() -> None:
    defaults = {"patience": 5, "mood": "bold"}
    config = LongerConfig.from_request(4, {"mood": "calm", "slack": 2}, defaults, n=None, max_tokens=None, seed=None)
    assert (config.patience, config.mood, config.slack) == (5, "calm", 2)
    assert LongerConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"valid settings are algorithm, .*, patience, slack, mood, is_loud, motto"):
        LongerConfig.from_request(4, {"moods": 1}, {}, n=None, max_tokens=None, seed=None)


def test_a_new_setting_has_its_flag_and_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "FLAGS", (*flags.SERVER_FLAGS, *flags.flags_of(LongerConfig)))
    monkeypatch.setenv("SGLANG_ETS_MOOD", "bold")
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    settings = flags.from_namespace(parser.parse_args(["--search-patience", "7"]))
    assert (settings["patience"], settings["mood"]) == (7, "bold")
    assert "slack" not in settings
    shown_help = " ".join(parser.format_help().split())
    assert "Levels to wait, in levels. Values: 1 to 9. If not set: 3. Also SGLANG_ETS_PATIENCE." in shown_help


def test_a_new_setting_stands_in_the_table() -> None:
    table = markdown_table(LongerConfig)
    assert table.startswith(markdown_table(SearchConfig))
    assert "| `patience` | `3` | 1 to 9 | `--search-patience` | Levels to wait, in levels. |" in table
    assert "| `slack` | none | 0 to 1.79769e+308 |  | How far to go. |" in table
    assert "| `mood` | `calm` | `calm`, `bold` | `--search-mood` | How to choose. |" in table
    assert "| `is_loud` | `false` | `true`, `false` |  | Say more. |" in table


def test_the_docs_show_the_table() -> None:
    assert markdown_table(SearchConfig) in (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), (
        "paste the output of `python -m sglang_ets.core.config` into docs/api.md"
    )


def test_every_field_is_a_setting_with_a_default_that_holds() -> None:
    names = [item.name for item in settings_of(SearchConfig)]
    assert [*names, "policy_settings"] == [*SearchConfig.__dataclass_fields__]
    assert SearchConfig() == SearchConfig(**{item.name: item.default for item in settings_of(SearchConfig)})
    assert not any(item.about.has_flag for item in settings_of(SearchConfig) if item.kind is bool and item.default)


SHOWN: list[tuple[Any, str]] = [
    ("a", "'a'"),
    ("\ud800\n", r"'\ud800\n'"),
    (10**5000, "an integer of 16610 bits"),
    (-(2**100), "-1267650600228229401496703205376"),
    ([[[["deep"]]]], "[[[...]]]"),
    ({"a": 1}, "{'a': 1}"),
    (list(range(9)), "[0, 1, 2, 3, ...]"),
]


@pytest.mark.parametrize(("value", "text"), SHOWN, ids=[case[1] for case in SHOWN])
def test_values_of_a_client_are_shown_short(value: Any, text: str) -> None:
    assert shown(value) == text


def test_a_long_text_is_shown_by_its_ends() -> None:
    text = shown("x" * 10**6)
    assert len(text) <= 80 and "..." in text
