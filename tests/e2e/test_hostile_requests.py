"""What a client may not send is refused with HTTP 400 and one sentence, and the scheduler goes on."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

import pytest

from bench.fuzz import FAULTS
from bench.hostile import HostileRequest
from tests.e2e.serving import PROBLEMS, Server

pytestmark = pytest.mark.server

PROMPT = PROBLEMS[0]["prompt"]
OUT_OF_VOCABULARY = 10**6
MAX_MESSAGE_CHARS = 1000
ABORTED_S = 2.3  # sglang waits for 2


def native(search: Any, text: str = PROMPT, **custom: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": 64, "custom_params": {"ets": search, **custom}}}


def completion(search: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "default", "prompt": PROMPT, "max_tokens": 64, "search_width": 4, "search": search, **fields}


# What is sent, and what the sentence names.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "text nested 5000 deep": (native("[" * 5000), "must be a JSON object"),
    "text with 400 digits": (native(f'{{"width": 4, "kv_cost_weight": {10**400}}}'), "kv_cost_weight"),
    "pattern of 500 groups": (native({"search_width": 4, "answer_pattern": "(" * 500}), "answer_pattern"),
    "completion, pattern of 500 groups": (completion({"answer_pattern": "(" * 500}), "answer_pattern"),
    "empty text": (native({"search_width": 4}, text=""), "prompt"),
    "question that is no text": (native({"search_width": 4}, ets_question=5), "ets_question"),
    "delimiter out of the vocabulary": (completion({"step_delimiter": [OUT_OF_VOCABULARY]}), "step_delimiter"),
    "the same with min_tokens": (
        completion({"step_delimiter": [OUT_OF_VOCABULARY]}, min_tokens=4),
        "step_delimiter",
    ),
    "half a surrogate pair": (native(r'{"width": 4, "step_delimiter": ["\ud800"]}'), "step_delimiter"),
}


@pytest.mark.parametrize(("body", "named"), REFUSED.values(), ids=[*REFUSED])
def test_the_request_is_refused_and_the_scheduler_goes_on(server: Server, body: dict[str, Any], named: str) -> None:
    status, answer = server.post("/generate" if "text" in body else "/v1/completions", body)
    assert status == 400, answer
    message = (answer.get("error") or answer)["message"]
    assert named in message
    assert "\n" not in message
    assert len(message) < MAX_MESSAGE_CHARS
    assert server.wait_until_no_search()["live"] == 0


# Ordinary requests that stock sglang answers with a bare HTTP 500.
UNREADABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "no sampling parameters in a list": (
        "/generate",
        {"text": PROMPT, "sampling_params": []},
        "sampling_params must be",
    ),
    "ids of two requests for one": ("/generate", {"text": PROMPT, "rid": ["a", "b"]}, "rid must be one text"),
    "the same in a completion": ("/v1/completions", {"prompt": PROMPT, "rid": ["a"]}, "rid must be one text"),
    "fewer adapters than prompts": (
        "/v1/completions",
        {"prompt": [PROMPT] * 2, "lora_path": ["a"]},
        "could not be read",
    ),
    "a stop pattern that is none": ("/v1/completions", {"prompt": PROMPT, "stop_regex": "("}, "could not be read"),
    "parameters of a session that nobody knows": (
        "/generate",
        {"text": PROMPT, "session_params": {"": 1}},
        "could not be read",
    ),
}


@pytest.mark.parametrize(("path", "body", "sentence"), UNREADABLE.values(), ids=[*UNREADABLE])
def test_an_ordinary_request_that_sglang_cannot_read_is_refused(
    server: Server, path: str, body: dict[str, Any], sentence: str
) -> None:
    status, answer = server.post(path, {"model": "default", **body} if path.startswith("/v1") else body)
    assert status == 400, answer
    message = (answer.get("error") or answer)["message"]
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "body", [{"sampling_params": {"n": 10**6}}, {"session_params": {"": 1}}], ids=["early", "late"]
)
def test_a_refused_stream_leaves_its_connection_whole(server: Server, body: dict[str, Any]) -> None:
    """sglang aborts a stream two seconds after its end; if that raises, the connection is closed under the next request."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    for given in ({"stream": True, **body}, {"sampling_params": {"max_new_tokens": 4}}):
        connection.request(
            "POST", "/generate", json.dumps({"text": PROMPT, **given}), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse().read()
        assert answer
        time.sleep(ABORTED_S if "stream" in given else 0)
    assert json.loads(answer)["meta_info"]["finish_reason"]
    connection.close()


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
def test_a_grammar_that_no_token_fits_fails_alone(server: Server, cut: dict[str, Any]) -> None:
    """Stock sglang's own error; where the batch was cut, its draw from no distribution ended the scheduler."""
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 4, "temperature": 1.0, "regex": "\u008f", **cut}
    status, answer = server.post("/v1/completions", body)
    assert status == 500
    assert FAULTS["a grammar that no token of the model fits"].explains(
        HostileRequest("/v1/completions", json.dumps(body).encode()), status, answer["message"]
    )
    assert server.post("/v1/completions", {"model": "default", "prompt": PROMPT, "max_tokens": 4})[0] == 200


def test_an_ordinary_request_and_a_search_are_answered_afterwards(server: Server) -> None:
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 8}
    assert server.post("/v1/completions", body)[0] == 200
    assert server.search(PROMPT, 4)["choices"][0]["text"]
