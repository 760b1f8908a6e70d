"""The search inside a request that has reached the scheduler, and whether it can be served."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sglang_ets.core.config import SearchConfig, check_vocabulary, check_width
from sglang_ets.core.settings import is_unicode, wrong
from sglang_ets.wire import CUSTOM_KEY, QUESTION_KEY

# What a native request may carry that a search cannot honour: attribute of sglang's request, and its name in the API.
REFUSED_NATIVE = {
    "return_logprob": "return_logprob",
    "return_hidden_states": "return_hidden_states",
    "return_routed_experts": "return_routed_experts",
    "lora_id": "lora_path",
    "multimodal_inputs": "image_data",
    "custom_logit_processor": "custom_logit_processor",
    "input_embeds": "input_embeds",
    "session": "session_params",
}
PLACE = f"custom_params['{CUSTOM_KEY}']"  # of a search in a native request
MAX_QUESTION_CHARS = 1_000_000  # far more than any context holds
REFUSED_SAMPLING = ("json_schema", "regex", "ebnf", "structural_tag")


def asks_for_search(req: Any) -> bool:
    """Whether a request carries a search."""
    custom = req.sampling_params.custom_params
    return isinstance(custom, dict) and CUSTOM_KEY in custom


def carried_config(req: Any, settings: Mapping[str, Any]) -> SearchConfig:
    """The search inside `sampling_params.custom_params` of a request that has reached the scheduler.

    The OpenAI endpoints send text that they have validated. A client of `/generate` sends an object: `search_width`, `n`,
    `seed` and the settings of `search`, all flat; `max_new_tokens` stays a sampling parameter, and sglang may have lowered
    it to what the context takes.

    Raises:
        ValueError: it cannot be served, whatever is wrong; one sentence for the client.
    """
    for attribute, name in REFUSED_NATIVE.items():
        if getattr(req, attribute, None):
            raise ValueError(f"{name} does not work together with a search; leave one of them out")
    for name in REFUSED_SAMPLING:
        if getattr(req.sampling_params, name, None):
            raise ValueError(f"{name} does not work together with a search; leave one of them out")
    _check_question(req.sampling_params.custom_params.get(QUESTION_KEY))
    given = req.sampling_params.custom_params[CUSTOM_KEY]
    room = max(1, req.sampling_params.max_new_tokens)
    config = SearchConfig.from_json(given) if isinstance(given, str) else _native_config(req, given, settings, room)
    check_width(config, settings["max_width"])
    check_vocabulary(config, req.vocab_size)
    return replace(config, max_tokens=room) if config.max_tokens > room else config


def _native_config(req: Any, given: object, settings: Mapping[str, Any], room: int) -> SearchConfig:
    if not isinstance(given, dict):
        raise wrong(PLACE, "an object of settings", given, "for example {'search_width': 16}")
    if "max_tokens" in given:
        rule = "without max_tokens"
        raise wrong(PLACE, rule, given["max_tokens"], "set max_new_tokens of sampling_params instead")
    outer: dict[str, Any] = {name: given.get(name) for name in ("search_width", "n", "seed")}
    return SearchConfig.from_request(
        outer["search_width"],
        {name: value for name, value in given.items() if name not in outer},
        settings,
        n=outer["n"],
        max_tokens=room,
        # Every tensor-parallel rank reads this request, and all must find the same seed.
        seed=zlib.crc32(req.rid.encode("utf-8", "replace")) if outer["seed"] is None else outer["seed"],
    )


def refusal(config: SearchConfig, req: Any, pool_tokens: int) -> str | None:
    """Why this server cannot run the search of `req`, in one sentence for the client; None if it can."""
    prompt_tokens = len(req.origin_input_ids)
    if not prompt_tokens:
        return "the prompt must hold at least one token, got none; send a text that is not empty"
    need = prompt_tokens + config.max_tokens + 1
    if need > pool_tokens:
        return (
            f"one trajectory may need {need} KV tokens (prompt {prompt_tokens} + max_tokens {config.max_tokens} + 1) "
            f"but the pool holds {pool_tokens}; lower max_tokens or raise --max-total-tokens"
        )
    return None


def _check_question(question: object) -> None:
    if question is None:
        return
    if not isinstance(question, str) or len(question) > MAX_QUESTION_CHARS or not is_unicode(question):
        rule = f"text of at most {MAX_QUESTION_CHARS} whole characters, or null"
        raise wrong(QUESTION_KEY, rule, question, "leave it out to ask about the prompt")


def prompt_text(req: Any) -> str:
    """The question as the scheduler knows it: what came with the request, or its whole prompt as text."""
    given = (req.sampling_params.custom_params or {}).get(QUESTION_KEY)
    return given if given is not None else str(req.tokenizer.decode(list(req.origin_input_ids)))
