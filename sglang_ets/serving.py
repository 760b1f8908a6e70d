"""The way of a search through the API server: refuse or convert, send as one request, answer with its result."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse

from sglang_ets.protocol import CUSTOM_KEY, QUESTION_KEY, check_server, question_of, response_body, search_config
from sglang_ets.streaming import last_report, stream_chunks


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
        sent = serving.tokenizer_manager.generate_request(internal, raw_request)
        answered = await anext(sent)
        report = _report(answered)
    except ValueError as error:
        return _error(str(error), "BadRequest", 400)
    except HTTPException as error:
        return _error(str(error.detail), "SearchFailed", error.status_code)
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
    manager = serving.tokenizer_manager
    check_server(manager.server_args)
    if serving._resolve_lora_path(request.model, getattr(request, "lora_path", None)):
        raise ValueError(f"model must name no LoRA adapter together with search_width, got {request.model!r}")
    config = search_config(request, manager.server_args._ets, manager.context_len)
    plain = request.model_copy(update={"n": 1, "stream_options": None})
    internal, _ = serving._convert_to_internal_request(plain, raw_request)
    sampling = internal.sampling_params
    sampling["max_new_tokens"] = config.max_tokens
    sampling["stream_interval"] = 1  # progress carries no tokens, and must not wait for any
    sampling["custom_params"] = {
        **(sampling.get("custom_params") or {}),
        CUSTOM_KEY: config.to_json(),
        QUESTION_KEY: question_of(request),
    }
    return internal


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
    if reason.get("status_code") == HTTPStatus.BAD_REQUEST:
        raise ValueError(message)
    raise HTTPException(reason.get("status_code") or 500, f"search failed: {message.removeprefix('search failed: ')}")


def _error(message: str, kind: str, status: int) -> JSONResponse:
    """sglang's shape of an error, on one line."""
    body = {"object": "error", "message": " ".join(message.split()), "type": kind, "param": None, "code": status}
    return JSONResponse(body, status)
