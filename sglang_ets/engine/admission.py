"""The search inside a request that has reached the scheduler, and whether it can be served."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sglang_ets.core.config import SearchConfig, check_width
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
        ValueError: it cannot be served; one sentence for the client.
        TypeError: a value has a type that no setting has.
    """
    for attribute, name in REFUSED_NATIVE.items():
        if getattr(req, attribute, None):
            raise ValueError(f"{name} does not work together with a search; leave one of them out")
    for name in REFUSED_SAMPLING:
        if getattr(req.sampling_params, name, None):
            raise ValueError(f"{name} does not work together with a search; leave one of them out")
    given = req.sampling_params.custom_params[CUSTOM_KEY]
    question = req.sampling_params.custom_params.get(QUESTION_KEY)
    if not isinstance(question, str | None):
        raise ValueError(f"{QUESTION_KEY} beside it must be a text, got {question!r}; leave it out")
    room = max(1, req.sampling_params.max_new_tokens)
    if isinstance(given, str):
        config = SearchConfig.from_json(given)
        config = replace(config, max_tokens=room) if config.max_tokens > room else config
    elif isinstance(given, dict):
        config = _flat_config(req, given, settings, room)
    else:
        raise ValueError(f"it must be an object of settings, got {given!r}; for example {{'search_width': 16}}")
    check_width(config, settings["max_width"])
    return config


def _flat_config(req: Any, given: Mapping[str, Any], settings: Mapping[str, Any], room: int) -> SearchConfig:
    outer: dict[str, Any] = {name: given.get(name) for name in ("search_width", "n", "seed")}
    return SearchConfig.from_request(
        outer["search_width"],
        {name: value for name, value in given.items() if name not in outer},
        settings,
        n=outer["n"],
        max_tokens=room,
        # Every tensor-parallel rank reads this request, and all must find the same seed.
        seed=zlib.crc32(req.rid.encode()) if outer["seed"] is None else outer["seed"],
    )


def refusal(config: SearchConfig, req: Any, pool_tokens: int, num_ranks: int) -> str | None:
    """Why this server cannot run the search of `req`, in one sentence for the client; None if it can."""
    prompt_tokens = len(req.origin_input_ids)
    if not prompt_tokens:
        return "the prompt must hold at least one token, got none; send a text that is not empty"
    unknown = [d for d in config.step_delimiter if isinstance(d, int) and d >= req.vocab_size]
    if unknown:
        return f"token ids of step_delimiter must be below {req.vocab_size}, got {unknown[0]}; leave it out"
    need = prompt_tokens + config.max_tokens + 1
    if need > pool_tokens:
        return (
            f"one trajectory may need {need} KV tokens (prompt {prompt_tokens} + max_tokens {config.max_tokens} + 1) "
            f"but the pool holds {pool_tokens}; lower max_tokens or raise --max-total-tokens"
        )
    if config.deadline_s is not None and num_ranks > 1:
        return "deadline_s needs tensor parallel size 1, because ranks must not decide by their own clocks; omit it"
    return None


def prompt_text(req: Any) -> str:
    """The question as the scheduler knows it: what came with the request, or its whole prompt as text."""
    given = (req.sampling_params.custom_params or {}).get(QUESTION_KEY)
    return given if given is not None else str(req.tokenizer.decode(list(req.origin_input_ids)))
