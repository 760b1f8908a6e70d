"""Hooks on the OpenAI endpoints: the request fields of a search and its way through the API server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sglang_ets.patches.record import Patch

OPENAI = "sglang.srt.entrypoints.openai"


async def answer_search(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any) -> Any:
    width = getattr(request, "search_width", None)
    if (type(width) is int and width == 1) or (width is None and getattr(request, "search", None) is None):
        return await original(serving, request, raw_request)
    from sglang_ets.api.serving import answer

    return await answer(serving, request, raw_request)


def add_search_pages(result: Any, serving: Any, *_args: Any, **_kwargs: Any) -> Any:
    # Only an HTTP server has the module loaded, and its handlers are made before it answers anything.
    if (server := sys.modules.get("sglang.srt.entrypoints.http_server")) is not None:
        add_routes(server.app, serving.tokenizer_manager.server_args._ets)
    return result


def add_routes(app: Any, settings: dict[str, Any]) -> None:
    from sglang_ets.api import trace_pages

    trace_pages.add_routes(app, settings)


FIELDS = "`search_width` and `search` are fields of a request, documented in `/openapi.json`"
NO_FIELDS = "none: the fields are ours"
FIELDS_GO = "sglang lets plugins declare request fields"

PATCHES: tuple[Patch, ...] = (
    Patch(
        f"{OPENAI}.protocol.CompletionRequest",
        "replace",
        "sglang_ets.api.protocol:CompletionRequest",
        "1895974b4d5fa8e087bd89c9515c66bbf304b3aa4da748cd2b38449c43580e06",
        FIELDS,
        NO_FIELDS,
        FIELDS_GO,
    ),
    Patch(
        f"{OPENAI}.protocol.ChatCompletionRequest",
        "replace",
        "sglang_ets.api.protocol:ChatCompletionRequest",
        "5d5990ec978280f6a5a1a172972fe91f5d395316372ee895a2ac42ca24ca7f9f",
        FIELDS,
        NO_FIELDS,
        FIELDS_GO,
    ),
    Patch(
        f"{OPENAI}.serving_base.OpenAIServingBase.handle_request",
        "around",
        "sglang_ets.patches.openai_api:answer_search",
        "f47d3e8fad409f773a3c8cfc48246b8cbd00825b89ffe333796649065282ee62",
        "a search is validated, sent as one request and answered with several ranked choices",
        "none: search inside the scheduler is new",
        "sglang offers search as a sampling mode",
    ),
    Patch(
        f"{OPENAI}.serving_base.OpenAIServingBase.__init__",
        "after",
        "sglang_ets.patches.openai_api:add_search_pages",
        "1aaebdfa3a341c01949710f6ad1fb397eeec54b8f1bdb5baafd5187975e36203",
        "`/search` and the live pages under it are routes of the server",
        "none: the pages are ours",
        "sglang lets plugins add routes",
    ),
)
