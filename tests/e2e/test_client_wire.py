"""Bodies that real clients sent, byte for byte as recorded, and what those clients read from the answer.

`python -m bench.clients` runs the clients themselves; they need packages that are no part of this project. What they sent to
a server with the embedded models stands in `tests/data/clients.json`.
"""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Server

pytestmark = pytest.mark.server

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "clients.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in RECORDED}
WHOLE = [name for name, case in CASES.items() if not case["body"].get("stream")]
STREAMED = [name for name in CASES if name not in WHOLE]
SEARCHED = [name for name in WHOLE if CASES[name]["body"]["search_width"] > 1]
Answers = dict[str, tuple[int, str]]


def send(url: str, case: dict[str, Any]) -> tuple[int, str]:
    """Status and raw text of the answer to one recorded body."""
    data = json.dumps(case["body"]).encode()
    request = urllib.request.Request(url + case["path"], data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.status, response.read().decode()


@pytest.fixture(scope="module")
def answers(server: Server) -> Answers:
    """All bodies at once, as clients with threads send them."""
    with ThreadPoolExecutor(len(RECORDED)) as pool:
        return dict(zip(CASES, pool.map(lambda case: send(server.url, case), RECORDED), strict=True))


def test_the_recording_holds_every_spelling_that_clients_have() -> None:
    prompts = {type(case["body"]["prompt"]) for case in RECORDED if "prompt" in case["body"]}
    assert prompts == {str, list}
    assert any(isinstance(case["body"].get("prompt", [""])[0], list) for case in RECORDED), "token ids in a list of one"
    assert [type(case["body"].get("search")) for case in RECORDED].count(dict) >= 4
    assert STREAMED


def texts_by_index(answered: dict[str, Any]) -> list[str]:
    """As lm_eval reads choices: each into the place that its index names."""
    texts: list[Any] = [None] * len(answered["choices"])
    for choice in answered["choices"]:
        is_chat = answered["object"] == "chat.completion"
        texts[choice["index"]] = choice["message"]["content"] if is_chat else choice["text"]
    return texts


@pytest.mark.parametrize("name", WHOLE)
def test_choices_are_texts_with_a_reason(name: str, answers: Answers) -> None:
    status, raw = answers[name]
    answered, body = json.loads(raw), CASES[name]["body"]
    assert status == 200
    texts = texts_by_index(answered)
    assert 1 <= len(texts) <= (body.get("n") or 1)
    assert all(isinstance(text, str) and text for text in texts)
    assert {choice["finish_reason"] for choice in answered["choices"]} <= {"stop", "length"}
    assert (answered["model"], answered["object"].startswith("chat")) == (body["model"], "messages" in body)
    if "messages" in body:
        assert {choice["message"]["role"] for choice in answered["choices"]} == {"assistant"}


@pytest.mark.parametrize("name", WHOLE)
def test_usage_adds_up(name: str, answers: Answers) -> None:
    usage = json.loads(answers[name][1])["usage"]
    assert usage["prompt_tokens"] > 0
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    if name in SEARCHED:
        details = usage["completion_tokens_details"]
        assert details["reasoning_tokens"] == 0, "LangChain copies it into usage_metadata"
        assert 0 < details["answer_tokens"] <= usage["completion_tokens"]


@pytest.mark.parametrize("name", SEARCHED)
def test_the_search_is_the_one_that_was_asked_for(name: str, answers: Answers) -> None:
    figures, body = json.loads(answers[name][1])["search"], CASES[name]["body"]
    asked = (body.get("search") or {}).get("algorithm", "ets")
    assert (figures["algorithm"], figures["width"]) == (asked, body["search_width"])
    if body.get("seed") is not None:
        assert figures["seed"] == body["seed"]


def test_width_1_is_an_ordinary_answer(answers: Answers) -> None:
    answered = json.loads(answers["langchain_chat_width_1"][1])
    assert "search" not in answered
    assert "search" not in answered["choices"][0]


def test_token_ids_in_a_list_of_one_are_the_same_prompt_as_their_text(answers: Answers) -> None:
    """lm_eval tokenises with the model's own tokenizer; LangChain sent the same problem as text in a list of one."""
    counts = {
        name: json.loads(answers[name][1])["usage"]["prompt_tokens"]
        for name in ("lm_eval_tokens", "langchain_completions")
    }
    assert counts["lm_eval_tokens"] == len(CASES["lm_eval_tokens"]["body"]["prompt"][0])
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_joins_to_one_answer_and_ends_with_usage(name: str, answers: Answers) -> None:
    status, raw = answers[name]
    assert status == 200
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas)
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason] in (["stop"], ["length"])
    assert [chunk["choices"] for chunk in chunks if chunk.get("usage")] == [[]], "one chunk has the usage and no choice"
    assert chunks[-1]["usage"]["completion_tokens"] > 0
