"""The way of a search through the API server: refuse or convert, send as one request, answer with its result."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse

from sglang_ets.api.protocol import check_server, error_body, error_kind, question_of, response_body, search_config
from sglang_ets.api.streaming import last_report, stream_chunks
from sglang_ets.api.trace import TRACES
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.presets import SAMPLING
from sglang_ets.core.settings import wrong
from sglang_ets.wire import CUSTOM_KEY, QUESTION_KEY, TRACE_PARAM

# OpenAI's clients send again what a 5xx answers. A search whose time is up is not wanted any more, and would cost it all again.
RETRY_HEADERS: Mapping[int, dict[str, str]] = {
    HTTPStatus.TOO_MANY_REQUESTS: {"Retry-After": "5"},
    HTTPStatus.GATEWAY_TIMEOUT: {"x-should-retry": "false"},
}
TITLE_CHARS = 80


def refuse_no_choices(request: Any) -> Response | None:
    """The answer to an ordinary request with `n` of 0, of which sglang makes one choice and then divides by their number.

    Returns:
        An HTTP response; None for a stream that counts no tokens at its end, which sglang serves.
    """
    options = request.stream_options
    if request.stream and not (options and options.include_usage):
        return None
    return _error(str(wrong("n", "at least 1", request.n, "leave it out for one choice")), "BadRequest", 400)


async def answer(serving: Any, request: Any, raw_request: Any) -> Any:
    """Answer a request that asks for a search. `serving` is sglang's handler of the endpoint.

    Returns:
        An HTTP response. A search that is refused is HTTP 400, one that fails the status that the scheduler gave it.
    """
    try:
        refusal = serving._validate_request(request)
        if refusal:
            raise ValueError(refusal)
        # Rendering and tokenizing a long prompt would hold up the event loop.
        internal = await asyncio.get_running_loop().run_in_executor(None, _convert, serving, request, raw_request)
        sent = _sent(serving.tokenizer_manager, request, internal, raw_request)
        answered = await anext(sent)
        if not request.stream:
            answered = await _last(answered, sent, serving.tokenizer_manager, raw_request)
        report = _report(answered)
    except ValueError as error:
        return _error(str(error), "BadRequest", 400)
    except HTTPException as error:
        return _error(str(error.detail), error_kind(error.status_code), error.status_code)
    rid = answered["meta_info"]["id"]
    if request.stream:
        # The first report is here, so a search that is refused has been answered with its status and not with a stream.
        return StreamingResponse(
            stream_chunks(request, rid, answered, sent),
            media_type="text/event-stream",
            background=serving.tokenizer_manager.create_abort_task(internal),
        )
    return JSONResponse(response_body(request, rid, report))


def _convert(serving: Any, request: Any, raw_request: Any) -> Any:
    """sglang's internal request with the search inside. It is one request: `n` ranks results, it samples no more.

    Raises:
        ValueError: see `search_config`.
    """
    from sglang.srt.arg_groups.model_override_base import resolved_view

    manager = serving.tokenizer_manager
    check_server(resolved_view(manager.server_args))  # not what was given: sglang may have decided otherwise
    if serving._resolve_lora_path(request.model, getattr(request, "lora_path", None)):
        rule = "the served model, and no LoRA adapter, together with search_width"
        raise wrong("model", rule, request.model, "leave the adapter or search_width out")
    config = search_config(request, manager.server_args._ets, manager.context_len)
    plain = request.model_copy(update={"n": 1, "stream_options": None})
    internal, _ = serving._convert_to_internal_request(plain, raw_request)
    sampling = internal.sampling_params
    sampling["max_new_tokens"] = config.max_tokens
    sampling |= {name: value for name, value in SAMPLING[config.preset].items() if getattr(request, name) is None}
    sampling["stream_interval"] = 1  # progress carries no tokens, and must not wait for any
    sampling["custom_params"] = {
        **(sampling.get("custom_params") or {}),
        CUSTOM_KEY: config.to_json(),
        QUESTION_KEY: question_of(request),
        TRACE_PARAM: is_traced(manager),
    }
    if is_traced(manager):
        internal.stream = True  # what the scheduler reports on the way is for the live page
        internal.rid = internal.rid or uuid.uuid4().hex
    return internal


def is_traced(manager: Any) -> bool:
    """Whether searches of this server have live pages."""
    return bool(manager.server_args._ets.get("trace"))


def _sent(manager: Any, request: Any, internal: Any, raw_request: Any) -> AsyncIterator[dict[str, Any]]:
    """What the scheduler sends for one search; followed by its live page where searches are traced."""
    sent: AsyncIterator[dict[str, Any]] = manager.generate_request(internal, raw_request)
    if not is_traced(manager):
        return sent
    config = SearchConfig.from_json(internal.sampling_params["custom_params"][CUSTOM_KEY])
    prompt = getattr(request, "prompt", None)
    question = question_of(request) or (prompt if isinstance(prompt, str) else "")
    title = " ".join(question.split())[:TITLE_CHARS] or internal.rid
    trace = TRACES.begin(internal.rid, title, {"algorithm": config.algorithm, "width": config.width})
    return TRACES.follow(trace, sent)


async def _last(
    answered: dict[str, Any], rest: AsyncIterator[dict[str, Any]], manager: Any, raw_request: Any
) -> dict[str, Any]:
    """The end of a search that its client does not stream. Without tracing the first report is the end.

    Raises:
        ValueError: the client is gone; its search is aborted.
        HTTPException: the scheduler sent no end.
    """
    while last_report(answered) is not None and not answered["meta_info"].get("finish_reason"):
        if raw_request is not None and await raw_request.is_disconnected():
            manager.abort_request(answered["meta_info"]["id"])
            raise ValueError("the client went away before its search ended")
        following = await anext(rest, None)
        if following is None:
            raise HTTPException(HTTPStatus.INTERNAL_SERVER_ERROR, "the scheduler returned no result")
        answered = following
    return answered


def _report(answered: dict[str, Any]) -> dict[str, Any]:
    """What the scheduler reported: the result or, in a stream, progress.

    Raises:
        ValueError: the scheduler refused the search.
        HTTPException: the search failed.
    """
    reason = answered["meta_info"].get("finish_reason") or {}
    report = last_report(answered)
    if report is not None and reason.get("type") != "abort":
        return report
    message = reason.get("message") or "the scheduler returned no result"
    # Outside a stream the tokenizer manager raises these itself.
    status = reason.get("status_code") or HTTPStatus.INTERNAL_SERVER_ERROR
    if status == HTTPStatus.BAD_REQUEST:
        raise ValueError(message)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        message = f"search failed: {message.removeprefix('search failed: ')}"
    raise HTTPException(status, message)


def _error(message: str, kind: str, status: int) -> Response:
    """In ASCII, so that any text can be sent: half a character, which a client can send as an escape, has no UTF-8."""
    body = json.dumps(error_body(message, kind, status))
    return Response(body, status, RETRY_HEADERS.get(status), media_type="application/json")
