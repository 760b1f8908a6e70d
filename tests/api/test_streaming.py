"""Which text is final when, and the chunks of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from sglang_ets.api.streaming import DONE, stream_chunks
from tests.api.test_protocol import RESULT, chat, completion

FIGURES = {"level": 1, "retained": 2, "complete": 0, "best_score": 0.5, "kv_held_tokens": 9}


def reported(*reports: dict[str, Any], **info: Any) -> dict[str, Any]:
    return {"meta_info": {"id": "id", "search": list(reports), **info}}


def progress(text: str, level: int = 1) -> dict[str, Any]:
    return {"progress": {**FIGURES, "level": level, "text": text}}


def events_of(request: Any, answers: Sequence[dict[str, Any]]) -> list[str]:
    async def rest() -> AsyncIterator[dict[str, Any]]:
        for answer in answers[1:]:
            yield answer

    async def run() -> list[str]:
        return [event async for event in stream_chunks(request, "id", answers[0], rest())]

    return asyncio.run(run())


def content(choice: dict[str, Any]) -> str:
    return str(choice["delta"].get("content", "") if "delta" in choice else choice["text"])


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("early", [[], ["1+"], ["", "1+2", "1+2", "1+2=3"]], ids=["none", "one", "all"])
@pytest.mark.parametrize("every", [1, 2, 5], ids=["each report", "two at once", "all at once"])
def test_a_stream_joins_to_the_answer(make: Any, with_usage: bool, early: list[str], every: int) -> None:
    request = make(stream=True, stream_options={"include_usage": with_usage})
    told = [progress(text, level) for level, text in enumerate(early, 1)]
    answers = [reported(*told[: i + 1]) for i in range(len(told)) if i % every == every - 1] + [reported(*told, RESULT)]
    events = events_of(request, answers)
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in events)
    assert events[-1] == DONE
    chunks = [json.loads(event[6:]) for event in events[:-1]]
    usage = [chunk["usage"] for chunk in chunks if "usage" in chunk]
    assert len(usage) == with_usage
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, text in enumerate(["1+2=3", "1+2=4"]):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(content(choice) for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == ("stop" if index == 0 else "length")
        assert make is completion or mine[0]["delta"]["role"] == "assistant"
    shown = [chunk["search"] for chunk in chunks if "search" in chunk]
    levels = [{"progress": {**FIGURES, "level": level}} for level in range(1, len(early) + 1)]
    assert shown == [*levels, RESULT["search"]]


EARLY = [[], ["", "", ""], ["", "1+"], ["1+", "1+2"], ["", "1+2=3", "1+2=3"]]


def streaming(request: Any, early: Sequence[str]) -> openai.OpenAI:
    """The official client of a server that streams a search which reports these final texts before its result."""
    levels = [progress(text, level) for level, text in enumerate(early, 1)]
    answers = [reported(*levels[: i + 1]) for i in range(len(levels))] + [reported(*levels, RESULT)]
    content = "".join(events_of(request, answers)).encode()
    headers = {"content-type": "text/event-stream"}
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=content, headers=headers))
    return openai.OpenAI(
        base_url="http://x/v1", api_key="k", max_retries=0, http_client=httpx.Client(transport=transport)
    )


@pytest.mark.parametrize("early", EARLY, ids=str)
def test_the_official_accumulator_joins_a_chat(early: list[str]) -> None:
    client = streaming(chat(stream=True, n=2, stream_options={"include_usage": True}), early)
    state = ChatCompletionStreamState()
    roles: list[int] = []
    for chunk in client.chat.completions.create(model="m", messages=[], stream=True):
        roles += [choice.index for choice in chunk.choices if choice.delta.role is not None]
        state.handle_chunk(chunk)
    done = state.current_completion_snapshot  # the final one is refused where a choice has reached its length
    assert [(choice.message.role, choice.message.content) for choice in done.choices] == [
        ("assistant", "1+2=3"),
        ("assistant", "1+2=4"),
    ]
    assert [choice.finish_reason for choice in done.choices] == ["stop", "length"]
    assert done.usage is not None and done.usage.completion_tokens == 90
    assert roles == [0, 1], "each choice has its role once, in its first chunk"


@pytest.mark.parametrize("early", EARLY, ids=str)
def test_a_client_of_completions_joins_the_texts(early: list[str]) -> None:
    client = streaming(completion(stream=True, n=2, stream_options={"include_usage": True}), early)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(model="m", prompt="p", stream=True):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing comes after the end of a choice"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert (texts, reasons) == (["1+2=3", "1+2=4"], ["stop", "length"])
    assert usage is not None and usage.completion_tokens == 90


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (None, "SearchFailed", "the scheduler returned no result"),
        (500, "SearchFailed", "no KV"),
        (503, "ServerStopping", "no KV"),
    ],
)
def test_a_search_that_fails_on_the_way_ends_with_an_error(status: int | None, kind: str, message: str) -> None:
    reason = {"type": "abort", "message": "no\nKV", "status_code": status}
    ends = [] if status is None else [reported(progress("1"), finish_reason=reason)]
    *_, error, done = events_of(completion(stream=True), [reported(progress("1")), *ends])
    assert done == DONE
    sent = json.loads(error[6:])["error"]
    assert (sent["code"], sent["type"], sent["message"]) == (status or 500, kind, message)
