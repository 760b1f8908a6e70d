"""Hooks on the OpenAI endpoints: the request fields of a search and its way through the API server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sglang_ets.patches import uses
from sglang_ets.patches.record import Patch, Use

OPENAI = "sglang.srt.entrypoints.openai"


def refuse_no_choices(request: Any) -> Any:
    if getattr(request, "n", None) != 0:
        return None
    from sglang_ets.api import serving

    return serving.refuse_no_choices(request)


async def answer_search(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any) -> Any:
    width = getattr(request, "search_width", None)
    if (type(width) is int and width == 1) or (width is None and getattr(request, "search", None) is None):
        return refuse_no_choices(request) or await original(serving, request, raw_request)
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


FIELDS_WHY = "`search_width` and `search` are fields of a request, documented in `/openapi.json`"
FIELDS_UPSTREAM = "none: the fields are ours"
FIELDS_GO_WHEN = "sglang lets plugins declare request fields"
FIELDS_ADDED = ("search_width", "search")
FIELDS_READ = (
    "model",
    "n",
    "max_tokens",
    "seed",
    "stream",
    "stream_options",
    "rid",
    "response_format",
    "custom_params",
)

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{OPENAI}.protocol.CompletionRequest",
        kind="replace",
        hook="sglang_ets.api.protocol:CompletionRequest",
        parameters=(),
        tested=("0f2c3a36ab149c26",),
        why=FIELDS_WHY,
        upstream=FIELDS_UPSTREAM,
        remove_when=FIELDS_GO_WHEN,
        uses=(Use(f"{OPENAI}.protocol.CompletionRequest", (*FIELDS_READ, "prompt")),),
        adds=FIELDS_ADDED,
    ),
    Patch(
        target=f"{OPENAI}.protocol.ChatCompletionRequest",
        kind="replace",
        hook="sglang_ets.api.protocol:ChatCompletionRequest",
        parameters=(),
        tested=("2f398bcb611561c8",),
        why=FIELDS_WHY,
        upstream=FIELDS_UPSTREAM,
        remove_when=FIELDS_GO_WHEN,
        uses=(Use(f"{OPENAI}.protocol.ChatCompletionRequest", (*FIELDS_READ, "messages", "max_completion_tokens")),),
        adds=FIELDS_ADDED,
    ),
    Patch(
        target=f"{OPENAI}.serving_base.OpenAIServingBase.handle_request",
        kind="around",
        hook="sglang_ets.patches.openai_api:answer_search",
        parameters=("self", "request", "raw_request"),
        tested=("c95935f8715260f7",),
        why="a search is validated, sent as one request and answered with several ranked choices",
        upstream="none: search inside the scheduler is new",
        remove_when="sglang offers search as a sampling mode",
        uses=uses.SERVING,
    ),
    Patch(
        target=f"{OPENAI}.serving_base.OpenAIServingBase.__init__",
        kind="after",
        hook="sglang_ets.patches.openai_api:add_search_pages",
        parameters=("self", "tokenizer_manager"),
        tested=("62334fa7999e0ccb",),
        why="`/search` and the live pages under it are routes of the server",
        upstream="none: the pages are ours",
        remove_when="sglang lets plugins add routes",
        uses=(Use(f"{OPENAI}.serving_base.OpenAIServingBase", ("tokenizer_manager",)),),
    ),
)
