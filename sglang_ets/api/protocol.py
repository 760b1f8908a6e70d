"""What a client may ask of a search, and what it gets back, on `/v1/completions` and `/v1/chat/completions`.

The fields are loose for pydantic and typed in `/openapi.json`: `SearchConfig` validates them, so that every refusal is
one sentence with HTTP 400 instead of a validation report.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model, model_validator
from sglang.srt.entrypoints.openai import protocol as openai_protocol

from sglang_ets.core import registry
from sglang_ets.core.config import MAX_WIDTH, MIN_WIDTH, SearchConfig, check_width
from sglang_ets.core.settings import Setting, is_unicode, settings_of, shown, wrong
from sglang_ets.wire import ABORTED_STATUS


def _field(item: Setting) -> Any:
    return Field(None, description=item.help_text, ge=item.about.low, le=item.about.high)


def options_model(settings_class: type) -> type[BaseModel]:
    """The `search` object of a request, for `/openapi.json`: the settings that stand inside it, each may be left out."""
    options: dict[str, Any] = {
        item.name: (
            item.json_type | None,
            _field(item),
        )
        for item in settings_of(settings_class)
        if not item.about.is_outer
    }
    for name in registry.names():
        if own := registry.own_settings(name):
            fields = {item.name: (item.json_type | None, _field(item)) for item in own}
            model = create_model(f"{name}_settings", __config__=ConfigDict(extra="forbid"), **fields)  # type: ignore[call-overload]
            # In one piece: a reference would lead nowhere from where this schema is put.
            schema = WithJsonSchema({"anyOf": [model.model_json_schema(), {"type": "null"}]})
            options[name] = (Annotated[Any, schema], Field(None, description=f"Own settings of the policy {name}."))
    doc = "Settings of a search. Defaults are the server's flags."
    return create_model("SearchOptions", __config__=ConfigDict(extra="forbid"), __doc__=doc, **options)


SearchOptions = options_model(SearchConfig)
SEED_BITS = 31  # of the seed of a request that has none

WidthField = Annotated[
    Any,
    Field(description="Trajectories to grow in a tree search guided by the PRM; absent or 1: an ordinary request."),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_WIDTH}, {"type": "null"}]}),
]
SearchField = Annotated[
    Any,
    Field(description="Settings of the search; needs search_width."),
    WithJsonSchema({"anyOf": [SearchOptions.model_json_schema(), {"type": "null"}]}),
]


def merged_extra_body(data: Any) -> Any:
    """The body with the fields of its `extra_body`, if a search stands there.

    The official client's argument of that name never arrives: it merges the fields itself, over those of the body. A client
    that sends the argument as it is means the same; a search that is passed over would be an ordinary answer, unnoticed.
    """
    extra = data.get("extra_body") if isinstance(data, dict) else None
    is_search = isinstance(extra, dict) and ("search_width" in extra or "search" in extra)
    return {**data, **extra} if is_search else data  # type: ignore[dict-item]


def merged_metadata(data: Any) -> Any:
    """The body with the search that stands in its `metadata` as texts: `{"search_width": "16", "search": "{...}"}`.

    For routers that pass on no field they do not know. What the body says itself goes first; a text that is no JSON stays
    one, and is refused for what it is.
    """
    metadata = data.get("metadata") if isinstance(data, dict) else None
    if not isinstance(metadata, dict) or metadata.get("search_width") is None:
        return data
    given = {name: _from_text(metadata[name]) for name in ("search_width", "search") if name in metadata}
    return {**given, **{name: value for name, value in data.items() if name not in given or value is not None}}


def _from_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


class CompletionRequest(openai_protocol.CompletionRequest):  # type: ignore[misc]  # sglang has no types
    """sglang's request with the fields of a search. The name is kept: it is the schema's name in `/openapi.json`."""

    search_width: WidthField = None
    search: SearchField = None

    @model_validator(mode="before")
    @classmethod
    def _merge_extra_body(cls, data: Any) -> Any:
        return merged_metadata(merged_extra_body(data))

    @model_validator(mode="after")
    def _unwrap_single_prompt(self) -> CompletionRequest:
        """Clients that can batch send one prompt as a list of one: `["text"]` or `[[1, 2]]`. A search takes it as that one."""
        prompt: Any = self.prompt  # type: ignore[has-type]
        is_list_of_one = isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int)
        if is_list_of_one and self.search_width not in (None, 1):
            self.prompt = prompt[0]
        return self


class ChatCompletionRequest(openai_protocol.ChatCompletionRequest):  # type: ignore[misc]
    """sglang's request with the fields of a search. The name is kept: it is the schema's name in `/openapi.json`."""

    search_width: WidthField = None
    search: SearchField = None

    @model_validator(mode="before")
    @classmethod
    def _merge_extra_body(cls, data: Any) -> Any:
        """sglang looks into the body and `response_format` before anything has seen that they are objects."""
        if not isinstance(data, (dict, BaseModel)):
            raise ValueError(f"the body must be a JSON object, got {shown(data)}; see docs/api.md")
        data = merged_metadata(merged_extra_body(data))
        given = data.get("response_format") if isinstance(data, dict) else None
        if given is not None and not isinstance(given, (dict, BaseModel)):
            raise ValueError(f"response_format must be an object, got {shown(given)}; leave it out")
        return data


# Fields that a search cannot honour: a request that sets one to something else than these values is refused.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (False,),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "regex": (None,),
    "ebnf": (None,),
    "json_schema": (None,),
    "lora_path": (None,),
    "session_id": (None,),
    "session_params": (None,),
    "custom_logit_processor": (None,),
    "watermark": (None,),
    "input_embeds": (None,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "continue_final_message": (False,),
}
# Server settings under which no search can run, and the value each must have.
UNSUPPORTED_SERVER = {
    "pp_size": (1, "pipeline parallelism"),
    "disaggregation_mode": ("null", "disaggregated prefill"),
    "speculative_algorithm": (None, "speculative decoding"),
    "enable_dp_attention": (False, "data-parallel attention"),
}


def search_config(request: Any, settings: Mapping[str, Any], context_tokens: int) -> SearchConfig:
    """The search that a request asks for.

    Raises:
        ValueError: it cannot be served; one sentence for the client.
    """
    _check_shape(request)
    _check_refused(request)
    given = request.model_fields_set
    max_tokens = getattr(request, "max_completion_tokens", None) or (
        request.max_tokens if "max_tokens" in given else None
    )
    # The seed is reported in the answer, so that the same tree can be had again.
    seed = random.getrandbits(SEED_BITS) if request.seed is None else request.seed
    config = SearchConfig.from_request(
        request.search_width,
        request.search,
        settings,
        n=request.n,
        max_tokens=max_tokens,
        seed=seed,
        most_tokens=max(1, context_tokens // 2),  # without a limit of its own, so that the prompt has room
    )
    check_width(config, settings["max_width"])
    if config.max_tokens >= context_tokens:
        raise ValueError(
            f"max_tokens must leave room for the prompt in the context of {context_tokens} tokens, "
            f"got {config.max_tokens}; lower max_tokens"
        )
    return config


def check_server(server_args: Any) -> None:
    """Raises:
    ValueError: the server runs in a mode in which no search is possible.
    """
    for name, (needed, what) in UNSUPPORTED_SERVER.items():
        if getattr(server_args, name, needed) != needed:
            raise ValueError(f"search does not work together with {what}; send the request without search_width")


def _check_shape(request: Any) -> None:
    width, search = request.search_width, request.search
    if width is None:
        raise ValueError("search needs search_width beside it; add search_width or leave search out")
    if isinstance(width, bool) or not isinstance(width, int) or width < MIN_WIDTH:
        raise ValueError(
            f"search_width must be an integer from {MIN_WIDTH} to {MAX_WIDTH}, got {shown(width)}; "
            "leave it out for an ordinary request"
        )
    if search is not None and not isinstance(search, dict):
        raise ValueError(
            f"search must be an object of settings, got {shown(search)}; for example {{'algorithm': 'ets'}}"
        )


def _check_refused(request: Any) -> None:
    for name, neutral in REFUSED.items():
        value = getattr(request, name, neutral[0])
        if not any(value == item and type(value) is type(item) for item in neutral):  # 0 is not False here
            given = f", got {shown(value)}" if isinstance(value, (bool, int, str)) else ""
            raise ValueError(f"{name} does not work together with search_width{given}; leave one of them out")
    response_format = getattr(request, "response_format", None)
    if response_format is not None and response_format.type != "text":
        raise ValueError(
            f"response_format must be text together with search_width, got {response_format.type!r}; "
            "leave one of them out"
        )
    if isinstance(getattr(request, "rid", None), list):
        raise wrong("rid", "one text together with search_width", request.rid, "send one request for each prompt")
    prompt = getattr(request, "prompt", None)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        raise ValueError(
            f"prompt must be one text or one list of token ids together with search_width, got {len(prompt)} prompts; "
            "send one request for each"
        )
    for message in getattr(request, "messages", None) or []:
        _check_text_only(message)
    for name, text in _texts(request):
        if not is_unicode(text):
            raise wrong(name, "text of whole characters", text, "send both halves of the pair")


def _texts(request: Any) -> Iterator[tuple[str, str]]:
    """What a tokenizer or an answer will hold of the request, each text with the name of its field."""
    values = [(name, getattr(request, name, None)) for name in ("model", "rid", "prompt", "stop")]
    values += [("messages", getattr(message, "content", None)) for message in getattr(request, "messages", None) or []]
    for name, value in values:
        for item in value if isinstance(value, list) else [value]:
            text = getattr(item, "text", item)
            if isinstance(text, str):
                yield name, text


def question_of(request: Any) -> str | None:
    """The last user message of a chat: what a PRM is asked about. A completion's prompt is its question itself."""
    for message in reversed(getattr(request, "messages", None) or []):
        content = getattr(message, "content", None)
        if getattr(message, "role", None) == "user" and content:
            return content if isinstance(content, str) else "".join(part.text for part in content)
    return None


def _check_text_only(message: Any) -> None:
    content = getattr(message, "content", None)
    kinds = [getattr(part, "type", "text") for part in content] if isinstance(content, list) else []
    for kind in kinds:
        if kind != "text":
            raise ValueError(
                f"messages must be text together with search_width, got a part of type {shown(kind)}; leave it out"
            )


def usage_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """All generated tokens count as completion tokens, those of pruned steps too; the details divide them."""
    usage = result["usage"]
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "answer_tokens": usage["answer_tokens"],
            "prm_tokens": usage["prm_tokens"],
        },
    }


def figures_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """`search` of a response: the figures of the search, and its tree if the client asked for it."""
    tree = {"tree": result["tree"]} if result.get("tree") is not None else {}
    return {**result["search"], **tree}


def finish_reason_of(answer: Mapping[str, Any]) -> Literal["stop", "length"]:
    """What ended a trajectory, in the words of OpenAI."""
    return "stop" if answer["finish_reason"] == "stop" else "length"


def details_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """`search` of a choice: how good the PRM finds it, and what it answers."""
    return {key: answer[key] for key in ("score", "step_scores", "answer", "votes")}


def error_body(message: str, kind: str, status: int) -> dict[str, Any]:
    """The JSON body of a refusal, on one line: OpenAI's shape, and beside it sglang's, for those who read that."""
    error = {"message": " ".join(message.split()), "type": kind, "param": None, "code": status}
    return {"object": "error", **error, "error": error}


_KINDS: Mapping[int, str] = {
    HTTPStatus.TOO_MANY_REQUESTS: "ServerBusy",
    ABORTED_STATUS: "SearchAborted",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServerStopping",
    HTTPStatus.GATEWAY_TIMEOUT: "DeadlinePassed",
}


def error_kind(status: int) -> str:
    """`type` in the error of a search that was admitted and has no answer."""
    return _KINDS.get(status, "SearchFailed")


def response_body(request: Any, rid: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON body of an answered search: ranked choices, honest usage, figures."""
    is_chat = hasattr(request, "messages")
    choices = []
    for index, answer in enumerate(result["results"]):
        text = answer["text"]
        body = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        if getattr(request, "return_token_ids", False):
            body["response_token_ids" if is_chat else "token_ids"] = answer["token_ids"]
        end = {"logprobs": None, "finish_reason": finish_reason_of(answer), "search": details_of(answer)}
        choices.append({"index": index, **body, **end})
    return {
        **head_of(request, rid, "chat.completion" if is_chat else "text_completion"),
        "choices": choices,
        "usage": usage_of(result),
        "search": figures_of(result),  # not in `metadata`, which the official client takes for texts
    }


def head_of(request: Any, rid: str, kind: str) -> dict[str, Any]:
    """The fields that a body and every chunk begin with."""
    return {"id": rid, "object": kind, "created": int(time.time()), "model": request.model}
