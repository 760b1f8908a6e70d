"""The chunks that carry what is known of a search's answer to the client, before its end and at it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from sglang_ets.api.protocol import details_of, error_body, error_kind, figures_of, finish_reason_of, head_of, usage_of
from sglang_ets.wire import PROGRESS_KEY, RESULT_KEY

DONE = "data: [DONE]\n\n"


async def stream_chunks(
    request: Any, rid: str, first: Mapping[str, Any], rest: AsyncIterator[Mapping[str, Any]]
) -> AsyncIterator[str]:
    """Server-sent events of a search: final text and progress as they become known, then the ranked choices.

    Only choice 0 streams early: whether there is a second answer is known at the end. `first` has the first report of the
    scheduler (see `last_report`), `rest` what it sends after; a busy server may hand out several at once. A search that
    fails on the way ends with an error event.
    """
    writer = _Writer(request, rid)
    answered = first
    while True:
        for event in writer.levels(answered):
            yield event
        report = last_report(answered)
        if report is None or PROGRESS_KEY not in report:
            break
        following = await anext(rest, None)
        reason = (following or {"meta_info": {}})["meta_info"].get("finish_reason")
        if following is None or (reason and reason.get("type") == "abort"):
            yield writer.error(reason or {})
            yield DONE
            return
        answered = following
    for event in writer.result(report or {}):
        yield event
    yield DONE


def last_report(answered: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest report in what the tokenizer manager hands out; it keeps all earlier ones before it."""
    reports = answered["meta_info"].get(RESULT_KEY)
    return dict(reports[-1]) if reports else None


class _Writer:
    """Chunks of one stream, and how much of choice 0 has been sent."""

    def __init__(self, request: Any, rid: str) -> None:
        self._request = request
        self._is_chat = hasattr(request, "messages")
        self._head = head_of(request, rid, "chat.completion.chunk" if self._is_chat else "text_completion")
        self._begun: set[int] = set()  # choices that have had their first chunk
        self._sent = ""
        self._level = 0

    def levels(self, answered: Mapping[str, Any]) -> Iterator[str]:
        """One event for each level that was not reported yet."""
        for report in answered["meta_info"].get(RESULT_KEY) or ():
            if PROGRESS_KEY in report and report[PROGRESS_KEY]["level"] > self._level:
                yield self._progress(report[PROGRESS_KEY])

    def _progress(self, progress: Mapping[str, Any]) -> str:
        figures = {key: value for key, value in progress.items() if key != "text"}
        text = progress["text"][len(self._sent) :]
        self._sent, self._level = progress["text"], progress["level"]
        choice = {"index": 0, **self._text(0, text), "finish_reason": None}
        return self._event([choice], search={PROGRESS_KEY: figures})

    def result(self, result: Mapping[str, Any]) -> Iterator[str]:
        last = len(result["results"]) - 1
        for index, answer in enumerate(result["results"]):
            sent = self._sent if index == 0 else ""
            choice = {"index": index, **self._text(index, answer["text"][len(sent) :]), "finish_reason": None}
            yield self._event([choice])
            end = {"finish_reason": finish_reason_of(answer), "search": details_of(answer)}
            figures = {"search": figures_of(result)} if index == last else {}
            yield self._event([{"index": index, **self._text(index, ""), **end}], **figures)
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield self._event([], usage=usage_of(result))

    def error(self, reason: Mapping[str, Any]) -> str:
        status = reason.get("status_code") or HTTPStatus.INTERNAL_SERVER_ERROR
        message = reason.get("message") or "the scheduler returned no result"
        error = error_body(message, error_kind(status), status)["error"]
        return f"data: {json.dumps({'error': error}, ensure_ascii=False)}\n\n"

    def _text(self, index: int, text: str) -> dict[str, Any]:
        """The piece of text as its endpoint writes it. Clients join roles, so a chat's stands in the first chunk alone."""
        if not self._is_chat:
            return {"text": text}
        if index not in self._begun:
            self._begun.add(index)
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text else {}}

    def _event(self, choices: list[dict[str, Any]], **fields: Any) -> str:
        return f"data: {json.dumps({**self._head, 'choices': choices, **fields}, ensure_ascii=False)}\n\n"
