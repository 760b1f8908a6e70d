"""What a request may ask of a search, each refusal, and the shape of the answers."""

from __future__ import annotations

import asyncio
import json
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from hypothesis import given
from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
from sglang_ets.patches.openai_api import answer_search

from sglang_ets.api import protocol
from sglang_ets.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    SearchOptions,
    check_server,
    error_body,
    options_model,
    question_of,
    response_body,
    search_config,
)
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.registry import BUILT_IN, names, own_settings
from sglang_ets.core.settings import setting, shown
from sglang_ets.engine import admission
from sglang_ets.engine.admission import carried_config, prompt_text
from sglang_ets.wire import QUESTION_KEY
from tests.core.test_config import JSON

SETTINGS = {"search": "rebase", "algorithm": "rebase", "max_width": 64, "max_tokens": 300, "step_delimiter": "\n"}
CONTEXT_TOKENS = 1000
ANSWER = {
    "text": "1+2=3",
    "token_ids": [5, 6],
    "finish_reason": "stop",
    "score": 0.5,
    "step_scores": [0.7, 0.5],
    "answer": "3",
    "votes": 2.0,
}
RESULT = {
    "results": [ANSWER, {**ANSWER, "text": "1+2=4", "answer": "4", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 90, "answer_tokens": 4, "prm_tokens": 100},
    "search": {"algorithm": "rebase", "kv_tokens_peak": 7},
}


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"model": "m", "prompt": "1+2=", "search_width": 16, **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(
        **{"model": "m", "messages": [{"role": "user", "content": "1+2="}], "search_width": 16, **fields}
    )


@pytest.mark.parametrize("make", [completion, chat])
def test_request_wins_over_the_servers_defaults(make: Any) -> None:
    request = make(n=3, seed=5, max_tokens=200, search={"algorithm": "ets", "step_delimiter": ["\n\n", 7]})
    config = search_config(request, SETTINGS, CONTEXT_TOKENS)
    expected = SearchConfig(
        algorithm="ets", width=16, num_results=3, max_tokens=200, step_delimiter=("\n\n", 7), seed=5
    )
    assert config == expected


@pytest.mark.parametrize("make", [completion, chat])
def test_defaults_of_the_server_fill_the_rest(make: Any) -> None:
    config = search_config(make(), SETTINGS, CONTEXT_TOKENS)
    assert (config.algorithm, config.max_tokens, config.step_delimiter) == ("rebase", 300, ("\n",))
    assert search_config(make(), SETTINGS, 100).max_tokens == 50


def test_max_completion_tokens_counts_for_chat() -> None:
    assert search_config(chat(max_completion_tokens=77), SETTINGS, CONTEXT_TOKENS).max_tokens == 77


@pytest.mark.parametrize("prompt", ["1+2=", [5, 6], [5]])
def test_a_list_of_one_prompt_is_that_prompt(prompt: Any) -> None:
    """lm-evaluation-harness sends token ids like this, LangChain texts."""
    assert completion(prompt=[prompt]).prompt == prompt
    search_config(completion(prompt=[prompt]), SETTINGS, CONTEXT_TOKENS)
    for width in (None, 1):
        assert completion(prompt=[prompt], search_width=width).prompt == [prompt], "an ordinary request stays as sent"


@pytest.mark.parametrize("prompt", ["1+2=", [5], [], ["a", "b"], [[1], [2]]])
def test_any_other_prompt_stays_as_sent(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt == prompt


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (completion, {"search_width": 0}, "search_width"),
    (completion, {"search_width": True}, "search_width"),
    (completion, {"search_width": "16"}, "search_width"),
    (completion, {"search_width": 65}, "search_width must be at most 64"),
    (completion, {"search_width": 10_000}, "search_width"),
    (completion, {"search_width": None, "search": {"algorithm": "ets"}}, "search needs search_width"),
    (completion, {"search_width": 1.0}, "search_width must be an integer from 2 to 1024, got 1.0"),
    (completion, {"search_width": 10**5000}, "search_width must be an integer from 2 to 1024, got an integer of"),
    (completion, {"search": ["ets"]}, "search must be an object"),
    (completion, {"search": "x" * 10_000}, "search must be an object"),
    (completion, {"search": {"x" * 10_000: 1}}, "valid settings are algorithm"),
    (completion, {"search": {"kv_cost_weight": 10**400}}, "kv_cost_weight must be a number"),
    (completion, {"search": {"step_delimiter": [chr(97 + i) * 10**6 for i in range(16)]}}, "step_delimiter must be"),
    (completion, {"search": {"answer_pattern": "(" * 500}}, "answer_pattern must be"),
    (completion, {"search": {"answer_pattern": "((?:ab){1000000})"}}, "answer_pattern must be"),
    (completion, {"regex": "x" * 10_000}, "regex"),
    (completion, {"model": "m\ud800"}, r"model must be text of whole characters, got 'm\\ud800'"),
    (completion, {"rid": "\ud800"}, "rid must be text of whole characters"),
    (completion, {"prompt": "1+\ud83d"}, "prompt must be text of whole characters"),
    (completion, {"stop": ["a", "\udc00"]}, "stop must be text of whole characters"),
    (chat, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages must be text of whole characters"),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
        "messages must be text of whole characters",
    ),
    (completion, {"search": {"algorithm": "mcts"}}, "best_of_n, beam, dvts, rebase, ets_kv, ets"),
    (completion, {"search": {"kv_weight": 1}}, "valid settings are algorithm"),
    (completion, {"search": {"seed": 4}}, "no setting 'seed'; seed stands beside search, not inside it; move it there"),
    (completion, {"n": 17}, "n must be"),
    (completion, {"max_tokens": CONTEXT_TOKENS}, "max_tokens"),
    (completion, {"logprobs": 0}, "logprobs"),
    (completion, {"echo": True}, "echo"),
    (completion, {"best_of": 2}, "best_of"),
    (completion, {"suffix": "a"}, "suffix"),
    (completion, {"regex": "a+"}, "regex"),
    (completion, {"ebnf": "root ::= a"}, "ebnf"),
    (completion, {"json_schema": "{}"}, "json_schema"),
    (completion, {"response_format": {"type": "json_object"}}, "response_format"),
    (completion, {"lora_path": "adapter"}, "lora_path"),
    (completion, {"session_params": {"id": "a"}}, "session_params"),
    (completion, {"custom_logit_processor": "p"}, "custom_logit_processor"),
    (completion, {"return_hidden_states": True}, "return_hidden_states"),
    (completion, {"prompt": ["a", "b"]}, "prompt"),
    (completion, {"prompt": [[1, 2], [3]]}, "prompt"),
    (completion, {"rid": ["a", "b"]}, r"^rid must be one text .*, got \['a', 'b'\]; send one request for each"),
    (chat, {"logprobs": True}, "logprobs"),
    (chat, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (chat, {"continue_final_message": True}, "continue_final_message"),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "image_url",
    ),
]


@pytest.mark.parametrize(("make", "fields", "named"), REFUSED, ids=[shown(case[1]) for case in REFUSED])
def test_refusals_are_one_sentence_that_names_the_field(make: Any, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        search_config(make(**fields), SETTINGS, CONTEXT_TOKENS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", [*protocol.REFUSED])
@pytest.mark.parametrize("make", [completion, chat])
def test_each_field_that_a_search_cannot_honour_is_refused(make: Any, name: str) -> None:
    request = make().model_copy(update={name: "given"})
    with pytest.raises(ValueError, match=rf"^{name} does not work together with search_width, got 'given'; [^\n]+$"):
        search_config(request, SETTINGS, CONTEXT_TOKENS)


def native(given: Any, sampling: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A request of `/generate` as it reaches the scheduler."""
    params = {"custom_params": {"ets": given}, "max_new_tokens": 50, **(sampling or {})}
    return SimpleNamespace(rid="native", vocab_size=100, sampling_params=SimpleNamespace(**params), **fields)


def test_native_requests_carry_a_flat_object_or_validated_text() -> None:
    given = {"search_width": 8, "n": 2, "seed": 4, "algorithm": "ets"}
    config = carried_config(native(given), SETTINGS)
    expected = SearchConfig(algorithm="ets", width=8, num_results=2, max_tokens=50, step_delimiter=("\n",), seed=4)
    assert config == expected
    assert carried_config(native(expected.to_json()), SETTINGS) == expected
    assert carried_config(native({"search_width": 8, "step_delimiter": 99}), SETTINGS).step_delimiter == (99,)
    unseeded = [carried_config(native({"search_width": 8}), SETTINGS).seed for _ in range(2)]
    assert unseeded[0] == unseeded[1]  # every rank finds the same seed for one request


@pytest.mark.parametrize("attribute", [*admission.REFUSED_NATIVE])
def test_each_native_field_that_a_search_cannot_honour_is_refused(attribute: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{admission.REFUSED_NATIVE[attribute]} does not work together with a search"
    ):
        carried_config(native({"search_width": 8}, **{attribute: "given"}), SETTINGS)


@pytest.mark.parametrize("name", admission.REFUSED_SAMPLING)
def test_each_grammar_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} does not work together with a search"):
        carried_config(native({"search_width": 8}, {name: "given"}), SETTINGS)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (16, "must be an object"),
        ({}, "search_width must be"),
        ({"search_width": 1}, "search_width must be"),
        ({"search_width": 65}, "at most 64"),
        ('{"width": 65}', "at most 64"),
        ({"search_width": 8, "kv": 1}, "no setting 'kv'"),
        ({"search_width": 8, "max_tokens": 5}, "without max_tokens, got 5; set max_new_tokens of sampling_params"),
        ({"search_width": 2**70}, "search_width must be"),
        ({"search_width": 8, "n": "2"}, "n must be"),
        ({"search_width": 8, "seed": []}, "seed must be"),
        ({"search_width": 8, "kv_cost_weight": 10**400}, "kv_cost_weight must be"),
        ({"search_width": 8, "answer_pattern": "(" * 500}, "answer_pattern must be"),
        ({"search_width": 8, "step_delimiter": 100}, "token ids below 100, the size of the model's vocabulary"),
        ("[" * 5000, "must be a JSON object"),
        ('{"width": 4, "kv_cost_weight": 1' + "0" * 400 + "}", "kv_cost_weight must be"),
        ('{"width": 4, "kv_cost_weight": 1' + "0" * 5000 + "}", "must be a JSON object"),
        ('{"width": 128}', "search_width must be at most 64 on this server, got 128"),
        ('{"width": 8, "step_delimiter": ["\\n", 100]}', "token ids below 100"),
        ('{"width": 8, "max_tokens": null}', "max_tokens must be"),
        (None, "must be an object of settings, got None"),
    ],
    ids=lambda value: shown(value)[:60],
)
def test_wrong_native_searches_are_refused(given: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        carried_config(native(given), SETTINGS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@given(JSON, JSON)
def test_nothing_but_a_value_error_leaves_admission(search: Any, question: Any) -> None:
    """Whatever `/generate` brings: any other error would end the scheduler."""
    req = native(search)
    req.sampling_params.custom_params[QUESTION_KEY] = question
    for text in (search, {"search_width": 8, "answer": search}, json.dumps(search)):
        req.sampling_params.custom_params["ets"] = text
        try:
            carried_config(req, SETTINGS)
        except ValueError as error:
            assert len(str(error)) < 600  # noqa: PT017


@pytest.mark.parametrize(
    "question",
    [5, ["q"], "\ud800", "q" * (admission.MAX_QUESTION_CHARS + 1)],
    ids=["number", "list", "half", "long"],
)
def test_a_native_question_is_text_of_bounded_length(question: Any) -> None:
    req = native({"search_width": 8})
    req.sampling_params.custom_params[QUESTION_KEY] = question
    with pytest.raises(
        ValueError, match=r"^ets_question must be text of at most 1000000 whole characters, or null, got "
    ):
        carried_config(req, SETTINGS)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"pp_size": 2}, "pipeline"),
        ({"disaggregation_mode": "decode"}, "disaggregated"),
        ({"speculative_algorithm": "EAGLE"}, "speculative"),
        ({"enable_dp_attention": True}, "data-parallel attention"),
    ],
)
def test_servers_that_cannot_search_refuse(setting: dict[str, Any], named: str) -> None:
    plain = {"pp_size": 1, "disaggregation_mode": "null", "speculative_algorithm": None, "enable_dp_attention": False}
    check_server(SimpleNamespace(**plain))
    with pytest.raises(ValueError, match=named):
        check_server(SimpleNamespace(**{**plain, **setting}))


def test_openapi_shows_typed_fields_that_match_the_config() -> None:
    for make in (CompletionRequest, ChatCompletionRequest):
        properties = make.model_json_schema()["properties"]
        assert properties["search_width"]["anyOf"][0]["type"] == "integer"
        options = properties["search"]["anyOf"][0]
        assert options["additionalProperties"] is False
    outer = {"width", "num_results", "max_tokens", "seed"}
    own = {name for name in BUILT_IN if own_settings(name)}
    assert (
        set(SearchOptions.model_fields) == (set(SearchConfig.__dataclass_fields__) - outer - {"policy_settings"}) | own
    )


def test_the_schema_of_search_holds_types_choices_ranges_and_help() -> None:
    properties = SearchOptions.model_json_schema()["properties"]
    assert properties["max_steps"]["anyOf"] == [{"type": "integer", "minimum": 1, "maximum": 1024}, {"type": "null"}]
    assert properties["max_steps"]["description"] == "Steps of one trajectory at most."
    assert properties["algorithm"]["anyOf"][0]["enum"] == list(names())
    particles = properties["particles"]["anyOf"][0]
    assert particles["additionalProperties"] is False
    assert particles["properties"]["temperature"]["anyOf"][0] == {"type": "number", "minimum": 1e-3, "maximum": 1e3}
    assert properties["coverage"]["anyOf"][0]["enum"] == ["uniform", "reward"]
    assert properties["deadline_s"]["anyOf"][0] == {"type": "number", "minimum": 1e-3, "maximum": 1e6}
    kinds = properties["step_delimiter"]["anyOf"]
    assert [kind["type"] for kind in kinds] == ["string", "integer", "array", "null"]


@dataclass(frozen=True)
class LongerConfig(SearchConfig):
    patience: int = setting(3, "levels to wait", low=1, high=9)


def test_a_new_setting_stands_in_the_schema() -> None:
    properties = options_model(LongerConfig).model_json_schema()["properties"]
    assert properties["patience"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 9}
    assert properties["patience"]["description"] == "Levels to wait."


@pytest.mark.parametrize("make", [completion, chat])
def test_body_holds_ranked_choices_usage_and_figures(make: Any) -> None:
    body = response_body(make(), "id", RESULT)
    texts = [choice["message"]["content"] if make is chat else choice["text"] for choice in body["choices"]]
    assert texts == ["1+2=3", "1+2=4"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["choices"][0]["search"] == {"score": 0.5, "step_scores": [0.7, 0.5], "answer": "3", "votes": 2.0}
    assert (body["usage"]["completion_tokens"], body["usage"]["total_tokens"]) == (90, 100)
    assert body["usage"]["completion_tokens_details"]["answer_tokens"] == 4
    assert body["search"] == RESULT["search"]
    assert "metadata" not in body  # a dictionary of texts in newer clients' chats, which warn of all else
    assert response_body(make(), "id", {**RESULT, "tree": {"nodes": []}})["search"]["tree"] == {"nodes": []}


class Serving(OpenAIServingBase):
    """sglang's handler with a scripted engine behind it."""

    def __init__(self, outcome: Any) -> None:
        server_args = SimpleNamespace(_ets=SETTINGS)
        self.outcome, self.sent = outcome, []
        self.tokenizer_manager: Any = SimpleNamespace(
            served_model_name="m",
            context_len=CONTEXT_TOKENS,
            server_args=server_args,
            generate_request=self.generate,
            create_abort_task=lambda _internal: None,
        )

    def _request_id_prefix(self) -> str:
        return ""

    def _convert_to_internal_request(self, request: Any, raw_request: Any = None) -> Any:
        sampling = {"n": request.n, "max_new_tokens": request.max_tokens, "custom_params": None}
        return SimpleNamespace(sampling_params=sampling, stream=request.stream), request

    async def generate(self, internal: Any, _raw_request: Any) -> Any:
        self.sent.append(internal)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        yield {"meta_info": {"id": "id", "finish_reason": {"type": "stop"}, **self.outcome}}


def post(outcome: Any, **fields: Any) -> tuple[Any, list[Any]]:
    async def stock(*_args: Any) -> str:
        return "stock"

    serving = Serving(outcome)
    return asyncio.run(answer_search(stock, serving, completion(**fields), None)), serving.sent


@pytest.mark.parametrize(("decided", "is_served"), [(None, True), ("EAGLE3", False)])
def test_what_sglang_made_of_the_servers_flags_counts_not_what_was_given(decided: str | None, is_served: bool) -> None:
    serving = Serving(ValueError("it came to the scheduler"))
    serving.tokenizer_manager.server_args = SimpleNamespace(
        _ets=SETTINGS, speculative_algorithm="EAGLE3", pp_size=1, disaggregation_mode="null", enable_dp_attention=False,
        _resolved_overrides=[("a decision of sglang", {"speculative_algorithm": decided})],
    )  # fmt: skip
    answer = asyncio.run(answer_search(lambda *_: None, serving, completion(), None))
    said = b"it came to the scheduler" if is_served else b"search does not work together with speculative decoding"
    assert said in answer.body and bool(serving.sent) == is_served


@pytest.mark.parametrize(
    "fields",
    [
        {"search_width": None},
        {"search_width": 1},
        {"search_width": 1, "search": {}},
        {"search_width": 1, "search": {"algorithm": "ets"}},
        {"extra_body": {"top_k": 1}},
        {"extra_body": {"search_width": 1}},
        {"extra_body": "search_width"},
    ],
)
def test_ordinary_requests_stay_with_sglang(fields: dict[str, Any]) -> None:
    assert post({}, **{"search_width": None, **fields}) == ("stock", [])


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(
    ("fields", "is_refused"),
    [
        ({"n": 0}, True),
        ({"n": 0, "stream": True, "stream_options": {"include_usage": True}}, True),
        ({"n": 0, "stream": True}, False),
        ({"n": 0, "stream": True, "stream_options": {"include_usage": False}}, False),
        ({"n": -1}, False),
        ({"n": 2000}, False),
    ],
    ids=str,
)
def test_no_choices_are_refused_where_sglang_divides_by_their_number(
    make: Any, fields: dict[str, Any], is_refused: bool
) -> None:
    """HTTP 400 or 500 behind the whole work, and a chat's stream that is cut off."""

    async def stock(*_args: Any) -> str:
        return "stock"

    answered: Any = asyncio.run(answer_search(stock, Serving({}), make(search_width=None, **fields), None))
    if not is_refused:
        assert answered == "stock"
        return
    assert answered.status_code == 400
    assert json.loads(answered.body)["message"] == "n must be at least 1, got 0; leave it out for one choice"


@pytest.mark.parametrize("width", [True, 1.0, "1"])
def test_what_only_equals_1_is_refused(width: Any) -> None:
    response, _ = post({}, search_width=width)
    assert response.status_code == 400
    assert "search_width must be an integer" in json.loads(response.body)["error"]["message"]


@pytest.mark.parametrize("make", [completion, chat])
def test_a_search_in_a_literal_extra_body_is_read(make: Any) -> None:
    """its-hub 1.2.0 sends the argument of the official client as a field of the body."""
    request = make(
        search_width=None,
        max_tokens=50,
        extra_body={"search_width": 8, "search": {"algorithm": "ets"}, "max_tokens": 70, "seed": 3},
    )
    config = search_config(request, SETTINGS, CONTEXT_TOKENS)
    assert (config.width, config.algorithm, config.max_tokens, config.seed) == (8, "ets", 70, 3)
    with pytest.raises(ValueError, match="search needs search_width"):
        search_config(make(search_width=None, extra_body={"search": {}}), SETTINGS, CONTEXT_TOKENS)


@pytest.mark.parametrize("make", [completion, chat])
def test_a_search_in_metadata_is_read(make: Any) -> None:
    """sglang-router passes on nothing of a chat that it does not know; of metadata, texts."""
    texts = {"search_width": "8", "search": '{"algorithm": "beam"}', "team": "a"}
    for metadata in (texts, {"search_width": 8, "search": {"algorithm": "beam"}}):
        config = search_config(make(search_width=None, metadata=metadata), SETTINGS, CONTEXT_TOKENS)
        assert (config.width, config.algorithm) == (8, "beam")
    assert search_config(make(search_width=4, metadata=texts), SETTINGS, CONTEXT_TOKENS).width == 4
    assert make(search_width=None, metadata={"search": "the tag of a client"}).search is None


@pytest.mark.parametrize("text", ["wide", "8.5", "true", '"8"', "[" * 100_000, "9" * 5000, "1"])
def test_a_width_in_metadata_that_is_none_is_refused_for_what_it_is(text: str) -> None:
    with pytest.raises(ValueError, match="search_width must be "):
        search_config(chat(search_width=None, metadata={"search_width": text}), SETTINGS, CONTEXT_TOKENS)


def test_a_list_of_one_prompt_counts_with_a_literal_extra_body_too() -> None:
    assert completion(search_width=None, prompt=["1+2="], extra_body={"search_width": 8}).prompt == "1+2="


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_gets_one_request_with_the_search_inside(stream: bool) -> None:
    response, (sent,) = post({"search": [RESULT]}, n=2, stream=stream, max_tokens=99)
    assert response.status_code == 200
    assert (sent.sampling_params["n"], sent.sampling_params["max_new_tokens"], sent.stream) == (1, 99, stream)
    config = SearchConfig.from_json(sent.sampling_params["custom_params"]["ets"])
    assert (config.width, config.num_results) == (16, 2)


class ServingChats(Serving):
    """A model whose generation_config.json says how to sample."""

    def _convert_to_internal_request(self, request: Any, raw_request: Any = None) -> Any:
        own = {"temperature": 0.6, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
        return SimpleNamespace(sampling_params=request.to_sampling_params([], own), stream=False), request


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("default", (0.6, 0.8, 5, 0.0, 1.1)), ("paper", (1.0, 1.0, 5, 0.0, 1.0))],
)
def test_the_published_sampling_goes_over_that_of_the_model_but_not_of_the_request(
    preset: str, expected: tuple[float, ...]
) -> None:
    """A penalty that nobody asked for would also keep equal steps from sharing a row of the batch."""
    serving = ServingChats({"search": [RESULT]})
    request = chat(search={"preset": preset}, top_k=5, max_tokens=99)
    assert asyncio.run(answer_search(None, serving, request, None)).status_code == 200
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert tuple(serving.sent[0].sampling_params[name] for name in names) == expected


@pytest.mark.parametrize(
    ("outcome", "fields", "status", "named"),
    [
        ({"search": [RESULT]}, {"echo": True}, 400, "echo"),
        ({"search": [RESULT]}, {"model": "m:adapter"}, 400, "got 'm:adapter'; leave the adapter or search_width out"),
        (ValueError("the context\nis too long"), {}, 400, "the context is too long"),
        (HTTPException(500, "search failed: no KV"), {}, 500, "no KV"),
        ({"finish_reason": {"type": "abort", "message": "Aborted"}}, {}, 500, "Aborted"),
        ({}, {}, 500, "no result"),
    ],
)
def test_errors_have_a_status_and_one_sentence(outcome: Any, fields: dict[str, Any], status: int, named: str) -> None:
    response, _ = post(outcome, **fields)
    assert response.status_code == status
    body = json.loads(response.body)
    message = body["error"]["message"]
    assert named in message
    assert "\n" not in message
    assert {key: body[key] for key in body["error"]} == body["error"], "sglang's shape holds the same"
    assert (body["object"], body["error"]["code"], body["error"]["param"]) == ("error", status, None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "kind", "headers"),
    [
        (429, "ServerBusy", {"retry-after": "5"}),
        (499, "SearchAborted", {}),
        (500, "SearchFailed", {}),
        (503, "ServerStopping", {}),
        (504, "DeadlinePassed", {"x-should-retry": "false"}),
    ],
)
def test_a_client_can_tell_why_there_is_no_answer(
    status: int, kind: str, headers: dict[str, str], stream: bool
) -> None:
    outcome: Any = HTTPException(status, "why")
    if stream:
        outcome = {"finish_reason": {"type": "abort", "message": "why", "status_code": status}}
    response, _ = post(outcome, stream=stream)
    error = json.loads(response.body)["error"]
    message = "search failed: why" if status == 500 and stream else "why"
    assert (response.status_code, error["code"], error["type"], error["message"]) == (status, status, kind, message)
    given = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
    assert given == headers


def test_an_error_holds_any_text() -> None:
    response, _ = post(ValueError("half \ud800 of a character"))
    assert json.loads(response.body)["error"]["message"] == "half \ud800 of a character"


HOSTILE_BODIES = {
    "too deep to parse": '"search": ' + "[" * 5000 + "]" * 5000,
    "deep": '"search": {"algorithm": ' + "[" * 900 + "]" * 900 + "}",
    "deep search": '"search": ' + "[" * 900 + "]" * 900,
    "deep width": '"search_width": ' + "[" * 900 + "]" * 900,
    "digits": '"search": {"kv_cost_weight": 1' + "0" * 400 + "}",
    "too many digits to parse": '"search": {"kv_cost_weight": 1' + "0" * 6000 + "}",
    "not a number": '"search": {"kv_cost_weight": NaN}',
    "many names": '"search": ' + json.dumps({str(i): i for i in range(100_000)}),
    "half a character": '"search": {"\\ud800": 1}',
    "half a model": '"model": "\\ud800"',
}


def test_hostile_bodies_are_refused_at_the_endpoint() -> None:
    """Through FastAPI's own parser and back, as bytes."""
    app = FastAPI()
    serving = Serving({"search": [RESULT]})

    async def endpoint(request: Any) -> Any:
        return await answer_search(unexpected, serving, request, None)

    async def unexpected(*_args: Any) -> None:
        raise AssertionError("an ordinary answer")

    endpoint.__annotations__["request"] = CompletionRequest
    app.post("/v1/completions")(endpoint)
    client = TestClient(app, headers={"Content-Type": "application/json"})
    for name, part in HOSTILE_BODIES.items():
        body = '{"model": "m", "prompt": "1+2=", "search_width": 4, ' + part + "}"
        answered = client.post("/v1/completions", content=body.encode())
        assert (answered.status_code, len(answered.content) < 2000) == (400, True), name
    assert not serving.sent
    whole = client.post("/v1/completions", content=b'{"model": "m", "prompt": "1+2=", "search_width": 4}')
    assert (whole.status_code, len(serving.sent)) == (200, 1)


def answering(status: int, body: dict[str, Any]) -> openai.OpenAI:
    """The official client of a server that answers everything like this."""
    transport = httpx.MockTransport(lambda _request: httpx.Response(status, json=body))
    return openai.OpenAI(
        base_url="http://x/v1", api_key="k", max_retries=0, http_client=httpx.Client(transport=transport)
    )


def test_the_official_client_reads_the_refusal() -> None:
    client = answering(400, error_body("n must be\nless", "BadRequest", 400))
    with pytest.raises(openai.BadRequestError, match="n must be less") as caught:
        client.completions.create(model="m", prompt="p")
    assert (caught.value.type, caught.value.param) == ("BadRequest", None)
    assert caught.value.body == {"message": "n must be less", "type": "BadRequest", "param": None, "code": 400}


def test_the_official_client_writes_answers_out_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = answering(200, response_body(completion(), "id", RESULT)).completions.create(model="m", prompt="p")
        turn = answering(200, response_body(chat(), "id", RESULT)).chat.completions.create(model="m", messages=[])
        for done in (whole, turn):
            assert done.to_dict()["search"] == RESULT["search"]
            assert json.loads(done.to_json())["choices"][0]["search"]["score"] == 0.5
            assert "kv_tokens_peak" in repr(done)


def test_a_prm_is_asked_about_the_last_user_message_or_the_whole_prompt() -> None:
    part = SimpleNamespace(type="text", text="2+2?")
    turns = [("user", "hi"), ("assistant", "yes?"), ("user", [part]), ("assistant", "4")]
    messages = [SimpleNamespace(role=role, content=content) for role, content in turns]
    assert question_of(SimpleNamespace(messages=messages)) == "2+2?"
    assert question_of(SimpleNamespace(prompt="1+1=")) is None
    assert question_of(SimpleNamespace(messages=messages[1:2])) is None
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{len(ids)}>")
    for custom, expected in ((None, "<2>"), ({QUESTION_KEY: None}, "<2>"), ({QUESTION_KEY: "q"}, "q")):
        sampling = SimpleNamespace(custom_params=custom)
        req = SimpleNamespace(sampling_params=sampling, tokenizer=tokenizer, origin_input_ids=[1, 2])
        assert prompt_text(req) == expected


@pytest.mark.parametrize("body", [None, [], "text", 1])
def test_a_chat_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(ValueError, match="the body must be a JSON object, got"):
        protocol.ChatCompletionRequest.model_validate(body)


@pytest.mark.parametrize("given", ["json", 1, [], 0.5])
def test_a_response_format_that_is_no_object_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="response_format must be an object, got"):
        protocol.ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], response_format=given)
