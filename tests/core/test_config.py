"""Settings of a search: each rule, each limit, the way from a request, and the way through plain text."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ets.core.config import (
    MAX_DELIMITER_CHARS,
    MAX_DELIMITERS,
    MAX_JSON_CHARS,
    MAX_STEPS_LIMIT,
    MAX_WEIGHT,
    MAX_WIDTH,
    OUTER_FIELDS,
    SearchConfig,
    Weights,
    check_vocabulary,
    check_width,
)
from sglang_ets.core.patterns import MAX_PATTERN_CHARS
from sglang_ets.core.settings import MAX_COUNT, settings_of, shown

ALLOWED: list[dict[str, Any]] = [
    {"width": 2, "num_results": 2},
    {"width": MAX_WIDTH, "num_results": MAX_WIDTH},
    {"max_tokens": 1, "max_steps": 1, "max_step_tokens": 1},
    {"max_steps": MAX_STEPS_LIMIT},
    {"step_delimiter": ("\n", 0, "\u00b6")},
    {"step_delimiter": tuple(range(16))},
    {"step_delimiter": (MAX_COUNT,)},
    {"max_tokens": MAX_COUNT, "max_step_tokens": MAX_COUNT},
    {"kv_cost_weight": 0, "diversity_weight": 0},
    {"kv_cost_weight": MAX_WEIGHT, "diversity_weight": MAX_WEIGHT},
    {"cluster_distance": 0.0},
    {"cluster_distance": 2},
    {"rebase_temperature": 1e-3},
    {"rebase_temperature": 1e3},
    {"kv_budget_tokens": 1, "algorithm": "ets_kv"},
    {"deadline_s": 1e-3},
    {"answer_pattern": r"result (\d+)"},
    {"return_tree": True, "return_embeddings": True},
    {"seed": 2**63 - 1},
]
BROKEN: list[tuple[dict[str, Any], str]] = [
    (
        {"algorithm": "mcts"},
        "algorithm must be one of best_of_n, beam, dvts, rebase, ets_kv, ets, dora, particles, subpool, got 'mcts'",
    ),
    ({"algorithm": None}, "algorithm must be one of"),
    ({"width": 1}, "search_width must be an integer from 2 to 1024, got 1"),
    ({"width": MAX_WIDTH + 1}, "search_width must be"),
    ({"width": 16.0}, "search_width must be"),
    ({"width": True}, "search_width must be"),
    ({"num_results": 0}, "n must be an integer from 1 to 1024, got 0"),
    ({"num_results": 17}, "n must be at most search_width, 16, got 17"),
    ({"max_tokens": 0}, "max_tokens must be an integer from 1 to 2147483647, got 0"),
    ({"max_tokens": MAX_COUNT + 1}, "max_tokens must be"),
    ({"max_tokens": 10**5000}, "got an integer of 16610 bits"),
    ({"max_steps": 0}, "max_steps must be"),
    ({"max_steps": MAX_STEPS_LIMIT + 1}, "max_steps must be"),
    ({"max_step_tokens": "8"}, "max_step_tokens must be"),
    ({"step_delimiter": ()}, "step_delimiter must be 1 to 16 texts or token ids"),
    ({"step_delimiter": tuple(range(17))}, "step_delimiter must be"),
    ({"step_delimiter": "\n"}, "step_delimiter must be"),
    ({"step_delimiter": ("",)}, "step_delimiter must be texts of 1 to 64 whole characters or token ids, got ''"),
    ({"step_delimiter": (-1,)}, "token ids, got -1"),
    ({"step_delimiter": (True,)}, "token ids, got True"),
    ({"step_delimiter": (2**70,)}, "token ids, got 1180591620717411303424"),
    ({"step_delimiter": ("\n", "a" * 65)}, "step_delimiter must be texts of 1 to 64 whole characters"),
    ({"step_delimiter": ("\ud800",)}, r"got '\ud800'"),
    ({"step_delimiter": (None,)}, "token ids, got None"),
    ({"kv_cost_weight": -0.1}, "kv_cost_weight must be a number from 0 to 1e"),
    ({"kv_cost_weight": math.nan}, "kv_cost_weight must be"),
    ({"kv_cost_weight": True}, "kv_cost_weight must be"),
    ({"kv_cost_weight": 10**400}, "kv_cost_weight must be a number from 0 to 1e+06, got an integer of 1329 bits"),
    ({"kv_budget_tokens": 10**400}, "kv_budget_tokens must be"),
    ({"deadline_s": 10**400}, "deadline_s must be"),
    ({"seed": 10**5000}, "seed must be"),
    ({"width": 2**70}, "search_width must be"),
    ({"diversity_weight": math.inf}, "diversity_weight must be"),
    ({"coverage": "all"}, "coverage must be one of uniform, reward, got 'all'"),
    ({"center_embeddings": 1}, "center_embeddings must be true or false, got 1"),
    ({"kv_cost": "bytes"}, "kv_cost must be one of tokens, nodes"),
    ({"cluster_distance": 2.1}, "cluster_distance must be a number from 0 to 2, got 2.1"),
    ({"cluster_distance": float("nan")}, "cluster_distance must be a number from 0 to 2, got nan"),
    ({"rebase_temperature": 0}, "rebase_temperature must be"),
    ({"score_aggregation": "sum"}, "score_aggregation must be one of last, min, mean, prod"),
    ({"answer": "worst"}, "answer must be one of best, majority, weighted_majority"),
    ({"answer_equality": "close"}, "answer_equality must be one of math, text"),
    ({"answer_pattern": ""}, "answer_pattern must be"),
    ({"answer_pattern": "a" * 501}, "answer_pattern must be"),
    ({"answer_pattern": "(a"}, "a group is not closed; write \\( for the character itself"),
    ({"answer_pattern": "(a)[b-a]"}, "it does not compile"),
    ({"answer_pattern": 7}, "answer_pattern must be text, got 7"),
    ({"answer_pattern": "a"}, "it has 0 groups, so put the answer into one, (...)"),
    ({"answer_pattern": "(a)(b)"}, "it has 2 groups, so write (?:...) for all but one"),
    ({"kv_budget_tokens": 0}, "kv_budget_tokens must be"),
    ({"kv_budget_tokens": 9, "algorithm": "rebase"}, "kv_budget_tokens needs algorithm ets or ets_kv"),
    (
        {"kv_budget_tokens": 9, "kv_cost": "nodes"},
        "is set, got 'nodes'; set it to tokens, or leave kv_budget_tokens out",
    ),
    ({"deadline_s": 0}, "deadline_s must be"),
    ({"deadline_s": False}, "deadline_s must be"),
    ({"return_tree": 1}, "return_tree must be true or false"),
    ({"return_embeddings": True}, "return_embeddings must be false without return_tree, got True"),
    ({"return_embeddings": 1}, "return_embeddings must be true or false"),
    ({"seed": -1}, "seed must be"),
    ({"seed": 2**63}, "seed must be"),
]


def from_request(search: dict[str, Any] | None = None, **fields: Any) -> SearchConfig:
    given_fields = {"search_width": 8, "defaults": {}, "n": None, "max_tokens": None, "seed": None, **fields}
    return SearchConfig.from_request(
        given_fields.pop("search_width"), search, given_fields.pop("defaults"), **given_fields
    )


@pytest.mark.parametrize("fields", ALLOWED, ids=str)
def test_values_at_the_limits_are_allowed_and_cross_as_text(fields: dict[str, Any]) -> None:
    config = SearchConfig(**fields)
    assert SearchConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("fields", "message"), BROKEN, ids=[shown(case[0]) for case in BROKEN])
def test_a_broken_rule_is_one_sentence_with_field_rule_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="; ") as caught:
        SearchConfig(**fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchConfig().width = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("width", "weight"), [(2, 1.5), (16, 1.5), (40, 1.5), (41, 1.4), (64, 1.4), (160, 1.4), (161, 1.45), (1024, 1.45)]
)
def test_coverage_weight_is_the_published_one_of_the_nearest_width(width: int, weight: float) -> None:
    assert SearchConfig(width=width).weights == Weights(kv_cost_weight=1.5, diversity_weight=weight)
    assert SearchConfig(width=width, kv_cost_weight=3.0).weights == (3.0, weight)
    assert SearchConfig(width=width, diversity_weight=0.0).weights.diversity_weight == 0.0


def test_coverage_by_reward_weighs_as_much_as_kv() -> None:
    assert SearchConfig(coverage="reward").weights == (4.0, 4.0)
    assert SearchConfig(coverage="reward", kv_cost_weight=2).weights == (2, 2)
    assert SearchConfig(coverage="reward", diversity_weight=0.5).weights == (4.0, 0.5)
    assert SearchConfig(algorithm="ets_kv").weights.kv_cost_weight == 1.0


def test_a_request_wins_over_the_server_and_the_server_over_the_fields() -> None:
    defaults = {"algorithm": "rebase", "max_steps": 9, "max_tokens": 50, "max_width": 64, "deadline_s": None, "port": 1}
    config = from_request({"max_steps": 7, "step_delimiter": "#"}, defaults=defaults, n=3, seed=5)
    expected = SearchConfig(
        algorithm="rebase", width=8, num_results=3, max_tokens=50, max_steps=7, step_delimiter=("#",), seed=5
    )
    assert config == expected
    assert from_request(defaults=defaults, max_tokens=60).max_tokens == 60


def test_null_means_not_given_except_where_null_is_a_value() -> None:
    defaults = {"algorithm": "beam", "diversity_weight": 0.5, "deadline_s": 2.0}
    assert from_request({"algorithm": None, "max_steps": None}, defaults=defaults).algorithm == "beam"
    config = from_request({"diversity_weight": None, "deadline_s": None}, defaults=defaults)
    assert (config.diversity_weight, config.deadline_s) == (None, None)


def test_a_setting_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(ValueError, match="search has no setting 'widht'; valid settings are algorithm, max_steps,"):
        from_request({"widht": 4})


@pytest.mark.parametrize("name", [*OUTER_FIELDS, "search_width", "n"])
def test_what_stands_beside_search_is_refused_inside_with_its_place(name: str) -> None:
    known = {"width": "search_width", "num_results": "n"}.get(name, name)
    with pytest.raises(ValueError, match=f"no setting '{name}'; {known} stands beside search, not inside it; move it"):
        from_request({name: 4})


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        '{"widht": 4}',
        "null",
        "",
        "{",
        "[" * 5000,
        '{"width": 1' + "0" * 6000 + "}",
        '{"seed": ' + "[" * 5000,
    ],
    ids=["list", "number", "name", "null", "nothing", "open", "deep", "digits", "deep value"],
)
def test_text_that_holds_no_settings_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a JSON object with the fields algorithm, width"):
        SearchConfig.from_json(text)
    with pytest.raises(ValueError, match="search_width must be"):
        SearchConfig.from_json(json.dumps({"width": 1}))


@given(
    width=st.integers(2, MAX_WIDTH),
    delimiters=st.lists(st.text(min_size=1, max_size=64) | st.integers(0, 10**6), min_size=1, max_size=16),
    weight=st.floats(0, MAX_WEIGHT),
    temperature=st.floats(1e-3, 1e3),
    budget=st.none() | st.integers(1, 10**9),
    data=st.data(),
)
def test_every_config_survives_the_way_through_text(
    width: int, delimiters: list[str | int], weight: float, temperature: float, budget: int | None, data: st.DataObject
) -> None:
    config = SearchConfig(
        width=width,
        num_results=data.draw(st.integers(1, width)),
        step_delimiter=tuple(delimiters),
        kv_cost_weight=weight,
        rebase_temperature=temperature,
        kv_budget_tokens=budget,
    )
    assert SearchConfig.from_json(config.to_json()) == config


def test_the_longest_settings_cross_as_text() -> None:
    widest = "\U0001f9ee"  # twelve characters of JSON
    config = SearchConfig(
        step_delimiter=(widest * MAX_DELIMITER_CHARS,) * MAX_DELIMITERS,
        answer_pattern=f"({widest * (MAX_PATTERN_CHARS - 2)})",
    )
    assert SearchConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="must be at most 20000 characters of JSON, got 20001; "):
        SearchConfig.from_json(" " * (MAX_JSON_CHARS + 1))


def test_limits_of_a_server_are_named() -> None:
    check_width(SearchConfig(width=64), 64)
    with pytest.raises(ValueError, match="search_width must be at most 63 on this server, got 64; "):
        check_width(SearchConfig(width=64), 63)
    config = SearchConfig(step_delimiter=("\n", 99))
    check_vocabulary(config, 100)
    with pytest.raises(ValueError, match="token ids below 99, the size of the model's vocabulary, got 99; "):
        check_vocabulary(config, 99)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(), max_size=100)
    | st.sampled_from(["ets", "\ud800", "(" * 500, "(a{99999})", "x" * 10_000, "("]),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(
    search=st.dictionaries(st.sampled_from([item.name for item in settings_of(SearchConfig)]) | st.text(), JSON),
    width=JSON | st.just(8),
    count=JSON,
    seed=JSON,
)
def test_whatever_a_client_sends_is_a_config_or_one_short_sentence(
    search: dict[str, Any], width: Any, count: Any, seed: Any
) -> None:
    for read in (
        lambda: from_request(search, search_width=width, n=count, seed=seed),
        lambda: SearchConfig.from_json(json.dumps({"width": width, **search})),
    ):
        message = ""
        try:
            config = read()
        except ValueError as error:
            message = str(error)
        else:
            assert SearchConfig.from_json(config.to_json()) == config
        assert len(message) < 600
        assert "\n" not in message
        assert message.encode().decode() == message


@pytest.mark.parametrize(("width", "diversity"), [(2, 1.5), (16, 1.5), (64, 1.4), (256, 1.45), (1024, 1.45)])
def test_the_papers_preset_is_the_published_setting_of_the_width(width: int, diversity: float) -> None:
    config = from_request({"preset": "paper"}, search_width=width)
    assert config.weights == (1.0, diversity)
    assert (config.kv_cost, config.coverage, config.cluster_distance, config.center_embeddings) == (
        "nodes",
        "uniform",
        0.05,
        False,
    )
    assert (config.max_tokens, config.max_step_tokens, config.max_steps) == (1024, 256, 25)
    assert (config.rebase_temperature, config.answer, config.early_stop) == (0.2, "weighted_majority", "off")
    assert SearchConfig(**config.preset_settings, preset="paper", width=width) == config
    assert SearchConfig.from_json(config.to_json()) == config


def test_own_values_win_over_a_preset_and_a_request_over_the_server() -> None:
    flags = {"preset": "paper", "kv_cost_weight": 3.0}
    config = from_request({"max_steps": 7}, defaults=flags, max_tokens=60)
    assert (config.preset, config.kv_cost_weight, config.max_steps, config.max_tokens) == ("paper", 3.0, 7, 60)
    assert config.preset_settings["kv_cost_weight"] == 3.0, "what is in force is shown"
    config = from_request({"preset": "default"}, defaults=flags)
    assert (config.kv_cost, config.kv_cost_weight, config.preset_settings) == ("tokens", 3.0, {})
    config = from_request({"preset": "paper", "coverage": "reward"}, defaults={"kv_cost_weight": 3.0})
    assert (config.kv_cost_weight, config.coverage) == (1.0, "reward"), "the word of a request counts more than a flag"
    assert from_request({"preset": "paper"}, most_tokens=200).max_tokens == 200, "the prompt has its room"
    with pytest.raises(ValueError, match="preset must be one of default, paper, got 'Paper'"):
        from_request({"preset": "Paper"})
    with pytest.raises(ValueError, match="search_width must be"):
        from_request({"preset": "paper"}, search_width="wide")
