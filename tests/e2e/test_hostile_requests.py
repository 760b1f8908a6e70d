"""What a client may not send is refused with HTTP 400 and one sentence, and the scheduler goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.serving import PROBLEMS, Server

pytestmark = pytest.mark.server

PROMPT = PROBLEMS[0]["prompt"]
OUT_OF_VOCABULARY = 10**6
MAX_MESSAGE_CHARS = 1000


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


def test_an_ordinary_request_and_a_search_are_answered_afterwards(server: Server) -> None:
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 8}
    assert server.post("/v1/completions", body)[0] == 200
    assert server.search(PROMPT, 4)["choices"][0]["text"]
