"""Hooks that keep the server up where stock sglang dies, stalls, serves what is stale, or is slow to stop."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from sglang_ets.patches import uses
from sglang_ets.patches.record import Patch, Use

from sglang_ets.wire import STOP_ID

MANAGERS = "sglang.srt.managers"
TOKENIZER_MANAGER = f"{MANAGERS}.tokenizer_manager.TokenizerManager"
HERE = "sglang_ets.patches.guards"


def check_arguments(result: None, server_args: Any) -> None:
    from sglang_ets import plugin

    plugin.check_radix_cache(server_args)
    plugin.check_prm(server_args)
    plugin.check_prm_ranks(server_args)
    return result


def check_request(original: Callable[..., Any], request: Any) -> Any:
    from sglang_ets.api import native

    native.check_request(request)
    with native.reading():
        return original(request)


def read_request(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang_ets.api.native import reading

    with reading():
        return original(manager, *args, **kwargs)


def refuse_unreadable(original: Callable[..., Any], scheduler: Any, recv_req: Any, **kwargs: Any) -> Any:
    try:
        return original(scheduler, recv_req, **kwargs)
    except Exception as error:  # of one request that a client has sent: the same boundary as the coordinator's `guard`
        return scheduler.ets.refuse(recv_req, error)


def refuse_prompt(manager: Any, obj: Any, input_ids: Any) -> None:
    from sglang_ets.api.native import check_prompt

    check_prompt(manager, obj, input_ids)


async def release_when_idle(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    from sglang_ets.api.native import check_release

    await check_release(manager)
    return await original(manager, obj, request)


def end_searches(result: None, handler: Any, *_args: Any, **_kwargs: Any) -> None:
    from sglang_ets.api import native

    native.end_searches(handler.tokenizer_manager)
    return result


def stop_searches(scheduler: Any, recv_req: Any) -> None:
    if recv_req.rid == STOP_ID:
        scheduler.ets.stop()


def forget_prm_cache(is_flushed: bool, scheduler: Any, *_args: Any, **_kwargs: Any) -> bool:
    if is_flushed:
        scheduler.ets.after_flush()
    return is_flushed


def end_without_collection(result: None, _scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    gc.freeze()
    return result


NOT_REPORTED = "none: not reported yet"

PATCHES: tuple[Patch, ...] = (
    Patch(
        target="sglang.srt.server_args.ServerArgs.resolve_once",
        kind="after",
        hook=f"{HERE}:check_arguments",
        parameters=("self",),
        tested=("0bdf2f58118dde60",),
        why="what a search cannot work with stops the server before weights load: no radix cache, a PRM of another kind, one "
        "that is not there, one that is split wrongly",
        upstream="none: search inside the scheduler is new",
        remove_when="sglang lets plugins check the arguments",
        uses=(
            Use("sglang.srt.arg_groups.model_override_base.resolved_view", ("server_args",)),
            Use("sglang.srt.arg_groups.fields.memory.Memory", ("disable_radix_cache",)),
            Use("sglang.srt.arg_groups.fields.exec_.ExecKernel", ("attention_backend",)),
            Use("sglang.srt.arg_groups.fields.exec_.ExecDeterministic", ("enable_deterministic_inference",)),
        ),
    ),
    Patch(
        target=f"{MANAGERS}.scheduler.Scheduler.handle_generate_request",
        kind="around",
        hook=f"{HERE}:refuse_unreadable",
        parameters=("self", "recv_req", "mm_input_error"),
        tested=("a520490e64d495a3",),
        why="a request that the scheduler cannot read is refused, and does not end the server",
        upstream=NOT_REPORTED,
        remove_when="sglang refuses what it cannot read",
        uses=uses.REFUSAL,
    ),
    Patch(
        target=f"{MANAGERS}.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        kind="around",
        hook=f"{HERE}:check_request",
        parameters=("self",),
        tested=("e6c3216be96e2dbd",),
        why="`n` of a million and a stop text of a million characters stall the HTTP process; lists that do not go with the "
        "prompts are a bare 500; the abort of a refused stream fails and closes the connection under the next request",
        upstream=NOT_REPORTED,
        remove_when="sglang bounds both and refuses such lists",
        uses=uses.NATIVE,
    ),
    Patch(
        target=f"{TOKENIZER_MANAGER}._init_req_state",
        kind="around",
        hook=f"{HERE}:read_request",
        parameters=("self", "obj", "request"),
        tested=("79e7c17f97af7eb7",),
        why="lists that are shorter than the prompts (`lora_path`, `bootstrap_host`) are refused and no bare 500",
        upstream=NOT_REPORTED,
        remove_when="sglang refuses such lists",
    ),
    Patch(
        target=f"{TOKENIZER_MANAGER}._create_tokenized_object",
        kind="around",
        hook=f"{HERE}:read_request",
        parameters=("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"),
        tested=("34b457358fec56cf",),
        why="parameters that sglang does not know (`session_params`) are refused; they are a bare 500, and cut a stream off",
        upstream=NOT_REPORTED,
        remove_when="sglang refuses such parameters",
    ),
    Patch(
        target=f"{TOKENIZER_MANAGER}._validate_one_request",
        kind="before",
        hook=f"{HERE}:refuse_prompt",
        parameters=("self", "obj", "input_ids"),
        tested=("c5956bbf19a548b0",),
        why="a prompt without a token, an id outside the vocabulary or more log probabilities than it has end the scheduler",
        upstream=NOT_REPORTED,
        remove_when="sglang refuses such prompts",
        uses=uses.NATIVE,
    ),
    Patch(
        target=f"{MANAGERS}.tokenizer_control_mixin.TokenizerControlMixin.release_memory_occupation",
        kind="around",
        hook=f"{HERE}:release_when_idle",
        parameters=("self", "obj", "request"),
        tested=("b43806e7c13aeeff",),
        why="the scheduler ends itself when it is asked to release its memory while anything runs",
        upstream=NOT_REPORTED,
        remove_when="sglang refuses it instead",
        uses=uses.NATIVE,
    ),
    Patch(
        target=f"{MANAGERS}.tokenizer_manager.SignalHandler.sigterm_handler",
        kind="after",
        hook=f"{HERE}:end_searches",
        parameters=("self",),
        tested=("463df5a25616c93f",),
        why="sglang waits for the end of all requests when it is asked to stop, and a search may take minutes",
        upstream="none: search inside the scheduler is new",
        remove_when="sglang bounds the time that it waits",
        uses=(*uses.NATIVE, Use(f"{MANAGERS}.tokenizer_manager.SignalHandler", ("tokenizer_manager",))),
    ),
    Patch(
        target=f"{MANAGERS}.scheduler.Scheduler.abort_request",
        kind="before",
        hook=f"{HERE}:stop_searches",
        parameters=("self", "recv_req"),
        tested=("c1f592343634270e",),
        why="the same, in the scheduler",
        upstream="none: search inside the scheduler is new",
        remove_when="sglang bounds the time that it waits",
        uses=uses.ABORT,
    ),
    Patch(
        target=f"{MANAGERS}.scheduler.Scheduler.handle_shutdown",
        kind="after",
        hook=f"{HERE}:end_without_collection",
        parameters=("self",),
        tested=("2f0788265888f5b2",),
        why="an interpreter that ends looks for garbage in all of torch and sglang, for three seconds of CPU",
        upstream=NOT_REPORTED,
        remove_when="sglang ends its processes faster",
    ),
    Patch(
        target=f"{MANAGERS}.scheduler.Scheduler.flush_cache",
        kind="after",
        hook=f"{HERE}:forget_prm_cache",
        parameters=("self",),
        tested=("1b515fe02c931c09",),
        why="the PRM's cache is stale too when weights or memory have changed",
        upstream="none: search inside the scheduler is new",
        remove_when="sglang offers a policy interface for internal requests",
    ),
)
