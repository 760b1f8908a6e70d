"""Requests that ask for no search have the same outcome on a server with search as on stock sglang."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.e2e.serving import PROBLEMS, Server, serving

pytestmark = pytest.mark.server

PROMPT = PROBLEMS[0]["prompt"]
DRAWN = {"temperature": 1.0, "top_k": 1}  # sampled, from one token alone
# For every sampling parameter of sglang, values that it takes, and some that it refuses.
CASES: dict[str, list[dict[str, Any]]] = {
    "max_new_tokens": [{"max_new_tokens": count} for count in (0, 1, 40, -1)],
    "stop": [{"stop": "="}, {"stop": ["5", "\n"]}],
    "stop_token_ids": [{"stop_token_ids": [3]}, {"stop_token_ids": [7, 10]}],
    "stop_regex": [{"stop_regex": "[0-9]="}],
    "temperature": [{"temperature": 0.7, "top_k": 1}, {"temperature": -1.0}],
    "top_p": [{"temperature": 1.0, "top_p": 1e-6}, {"top_p": 0.0}],
    "top_k": [DRAWN, {"top_k": 0}, {"top_k": -1}],
    "min_p": [{"temperature": 1.0, "min_p": 1.0}, {"min_p": 2.0}],
    "frequency_penalty": [{"frequency_penalty": 1.5}, {"frequency_penalty": 3.0}],
    "presence_penalty": [{"presence_penalty": -1.5}, {"presence_penalty": 3.0}],
    "repetition_penalty": [{"repetition_penalty": 1.5}, {"repetition_penalty": 0.0}],
    "min_new_tokens": [{"min_new_tokens": 30, "max_new_tokens": 40, "stop": "\n"}, {"min_new_tokens": 30}],
    "n": [{"n": count} for count in (0, -1, 2)],
    "beam_width": [{"beam_width": 0}],
    "json_schema": [{"json_schema": '{"type": "integer"}'}, {"json_schema": "{"}],
    "regex": [{"regex": "[0-9]{3}"}, {"regex": "("}],
    "ebnf": [{"ebnf": 'root ::= "1" | "2"'}],
    "structural_tag": [{"structural_tag": "{"}],
    "ignore_eos": [{"ignore_eos": True, "max_new_tokens": 100}],
    "skip_special_tokens": [{"skip_special_tokens": False, "max_new_tokens": 100}],
    "spaces_between_special_tokens": [{"spaces_between_special_tokens": False}],
    "no_stop_trim": [{"no_stop_trim": True, "stop": "="}],
    "stream_interval": [{"stream_interval": 3}],
    "logit_bias": [{"logit_bias": {"5": 100.0}}, {"logit_bias": {"100000": 1.0}}],
    "sampling_seed": [{"sampling_seed": 7}, {"sampling_seed": 7, **DRAWN}, {"sampling_seed": "seven"}],
    "custom_params": [{"custom_params": {"a": 1}}],
    "watermark": [{"watermark": None}],
}
TIME_OF_DAY = re.compile(r"\[\d\d:\d\d:\d\d\] ")  # in what the grammar compiler says
MADE_BY_SGLANG = {
    *("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len"),
    *("is_normalized", "ebnf_full_assistant"),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("stock") / "log.txt", ["--search", "off"]) as running:
        yield running


def outcome(server: Server, sampling: dict[str, Any]) -> Any:
    """What a client gets, without what differs from run to run: texts, tokens and ends, or the error."""
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 24} | sampling}
    status, answer = server.post("/generate", body)
    if status != 200:
        error = answer.get("error", answer)  # refused as a whole before it is read, or by its values
        message = error["message"] if isinstance(error, dict) and "message" in error else error
        return status, TIME_OF_DAY.sub("", str(message))
    answers = answer if isinstance(answer, list) else [answer]
    ends = [(one["meta_info"]["finish_reason"], one["meta_info"]["completion_tokens"]) for one in answers]
    return [(one["text"], one["output_ids"], end) for one, end in zip(answers, ends, strict=True)]


def test_every_sampling_parameter_of_sglang_is_tried() -> None:
    assert set(CASES) == set(SamplingParams.__struct_fields__) - MADE_BY_SGLANG


@pytest.mark.parametrize("name", CASES)
def test_a_sampling_parameter_does_the_same(server: Server, stock: Server, name: str) -> None:
    for sampling in CASES[name]:
        assert name in sampling
        assert outcome(server, sampling) == outcome(stock, sampling), sampling


def test_no_choice_at_all_is_refused_where_stock_sglang_divides_by_it(server: Server, stock: Server) -> None:
    body = {"model": "default", "prompt": PROMPT, "n": 0, "max_tokens": 4, "temperature": 0}
    for fields, status in (({"echo": True}, 500), ({}, 400), ({"prompt": [PROMPT, PROMPT]}, 500)):
        assert [one.post("/v1/completions", body | fields)[0] for one in (server, stock)] == [400, status], fields


def test_the_parameters_have_an_effect_at_all(stock: Server) -> None:
    """Else the same outcome would show nothing."""
    plain = outcome(stock, {})
    changed = ("stop", "max_new_tokens", "regex", "json_schema")
    assert [name for name in changed if outcome(stock, CASES[name][0]) == plain] == []
    assert [outcome(stock, sampling) for sampling in ({"sampling_seed": 7}, DRAWN)] == [plain, plain]


def test_without_search_the_server_is_stock(server: Server, stock: Server) -> None:
    for problem in PROBLEMS[:8]:
        body = {"model": "default", "prompt": problem["prompt"], "max_tokens": 128, "temperature": 0}
        (status, patched), (_, plain) = server.post("/v1/completions", body), stock.post("/v1/completions", body)
        assert status == 200
        assert patched["choices"] == plain["choices"]
    assert "search" not in stock.get("/server_info")["internal_states"][0]
