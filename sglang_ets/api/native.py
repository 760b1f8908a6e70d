"""What sglang lets pass on its way to the scheduler and the scheduler then dies of, refused in the HTTP process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput

from sglang_ets.core.settings import shown, wrong
from sglang_ets.wire import STOP_ID

MAX_SAMPLES = 8192  # of one request, prompts times n: sglang makes as many requests at once, on the event loop
MAX_N = 1024  # for one prompt: these hold up the event loop for 0.1 s, 4,096 for 2 s, 8,192 for 5 s
MAX_TEXT_CHARS = {"regex": 10_000, "ebnf": 100_000, "json_schema": 1_000_000, "stop": 10_000}
MAX_INTEGER, MAX_SEED = 2**31 - 1, 2**63 - 1
SEEDS = ("sampling_seed", "seed")
IDLE_WAIT_S = 2.0
# What Python raises when a value has not the type or the length that the code expects, or is no regular expression.
UNREADABLE = (TypeError, IndexError, KeyError, AttributeError, OverflowError, RecursionError, re.error)


@contextmanager
def reading() -> Iterator[None]:
    """Around sglang's code that takes a client's values apart before anything is sent on.

    Raises:
        ValueError: a value has a type, a length or a form that nothing has checked; elsewhere a bare HTTP 500.
    """
    try:
        yield
    except UNREADABLE as error:
        reason = shown(str(error))
        raise ValueError(
            f"the request could not be read ({type(error).__name__}: {reason}); check the types and the form of its "
            "fields, and the lengths of its lists"
        ) from error


def check_request(request: GenerateReqInput) -> None:
    """All that is checked before sglang looks into a request.

    Raises:
        ValueError: see the checks.
    """
    # sglang's abort of a stream reads it, and sets it only in requests that it does not refuse.
    request.is_single = not isinstance(request.rid, list)
    check_lists(request)
    check_texts(request)
    check_integers(request)
    check_samples(request)


def check_lists(request: GenerateReqInput) -> None:
    """Refuse lists that do not go with the prompts.

    Raises:
        ValueError: ids of several requests for one, or no sampling parameters in a list of them.
    """
    if isinstance(request.rid, list) and (isinstance(request.text, str) or _is_ids(request.input_ids)):
        raise wrong("rid", "one text for one prompt", request.rid, "send one text, or a list of prompts")
    if request.sampling_params == []:
        raise wrong("sampling_params", "an object, or one for each prompt", [], "leave it out for the defaults")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def check_texts(request: GenerateReqInput) -> None:
    """Refuse grammars that take minutes to compile, stop texts that are tokenised for seconds on the event loop, and
    embeddings without a vector, which sglang looks into unasked.

    Raises:
        ValueError: one of these.
    """
    if isinstance(request.input_embeds, list) and not (request.input_embeds and request.input_embeds[0]):
        raise wrong("input_embeds", "lists of vectors", request.input_embeds, "leave it out")
    params = request.sampling_params
    for own in params if isinstance(params, list) else [params]:
        for name, most in MAX_TEXT_CHARS.items():
            given = own.get(name) if isinstance(own, dict) else None
            texts = given if isinstance(given, list) else [given]
            if sum(len(text) for text in texts if isinstance(text, str)) > most:
                raise wrong(name, f"text of at most {most} characters", given, "send a shorter one")


def check_integers(request: GenerateReqInput) -> None:
    """Refuse integers that the scheduler's tensors cannot hold.

    Raises:
        ValueError: a sampling parameter, or one inside it, is such an integer.
    """
    params = request.sampling_params
    for own in params if isinstance(params, list) else [params]:
        for name, value in own.items() if isinstance(own, dict) else ():
            most = MAX_SEED if name in SEEDS else MAX_INTEGER
            if name != "custom_params" and any(abs(number) > most for number in _integers(value)):
                raise wrong(name, f"integers from -{most} to {most}", value, "choose smaller ones")


def _integers(value: object) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)


def check_samples(request: GenerateReqInput) -> None:
    """Refuse more samples than the event loop can make in a moment, and fewer than one for each of several prompts, for which
    sglang has no answer; for one prompt it takes them for one sample.

    Raises:
        ValueError: one of these.
    """
    params = request.sampling_params
    first = params[0] if isinstance(params, list) and params else params
    n = first.get("n") if isinstance(first, dict) else None
    if not isinstance(n, int):
        return  # not given, or refused when sglang computes with it
    prompts = request.input_ids if request.text is None else request.text
    is_list = isinstance(prompts, list) and not _is_ids(prompts)
    if n > MAX_N:
        raise wrong("n", f"at most {MAX_N}", n, "send several requests for more")
    if n < 1 and is_list:
        raise wrong("n", "at least 1 for a list of prompts", n, "leave it out for one sample each")
    total = n * (len(prompts) if is_list else 1)
    if n > 1 and total > MAX_SAMPLES:
        raise wrong("n", f"at most {MAX_SAMPLES} over the prompts of a request", total, "send several requests")


def check_prompt(manager: Any, request: Any, token_ids: list[int] | None) -> None:
    """Refuse a prompt without a token, and what reaches beyond the vocabulary.

    Raises:
        ValueError: one of both.
    """
    if not isinstance(request, GenerateReqInput) or request.contains_mm_input() or request.input_embeds is not None:
        return
    if not token_ids and not request.session_params:
        raise ValueError("the prompt must hold at least one token, got none; send a text that is not empty")
    size = manager.model_config.vocab_size
    wanted = request.top_logprobs_num
    if isinstance(wanted, int) and wanted > size:
        raise wrong("top_logprobs_num", f"at most {size}, the size of the vocabulary", wanted, "ask for fewer")
    if request.input_ids is None or not token_ids:
        return  # the tokenizer makes no ids but its own
    strange = next((token for token in token_ids if type(token) is not int or not 0 <= token < size), None)
    if strange is not None:
        raise wrong("input_ids", f"integers from 0 to {size - 1}", strange, "use the tokenizer of this model")


async def check_release(manager: Any) -> None:
    """Refuse to release memory unless the server can, and is idle. It is idle when its cache lets itself be emptied.

    Raises:
        ValueError: requests or searches run, or the server keeps its memory; the scheduler would end itself.
    """
    _check_no_requests(manager)
    if not manager.server_args.enable_memory_saver:
        raise ValueError("memory can be released only by a server with --enable-memory-saver; start it with that flag")
    # A request that has been answered leaves the scheduler within a tick.
    flushed = await manager.flush_cache(timeout_s=IDLE_WAIT_S)
    _check_no_requests(manager)
    if not flushed.success:
        raise ValueError(
            f"memory can be released only while nothing runs, got work for over {IDLE_WAIT_S:g} s; try again"
        )


def _check_no_requests(manager: Any) -> None:
    """What waits while generation is paused may wait on."""
    if manager.rid_to_state and not manager.is_pause:
        raise ValueError(
            f"memory can be released only while nothing runs, got {len(manager.rid_to_state)} requests; wait for their "
            "end, or call /abort_request with abort_all"
        )


def end_searches(manager: Any) -> None:
    """Tell the scheduler that the server has been asked to stop. sglang waits for requests; a search may take minutes."""
    if manager.event_loop is not None:
        manager._dispatch_to_scheduler(AbortReq(rid=STOP_ID))
