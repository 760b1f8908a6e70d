"""Hooks on the scheduler: where a search enters the engine, is fed by it and leaves it.

Each hook begins with an O(1) test, so an ordinary request pays nothing; the logic is in `sglang_ets.engine.coordinator`.
Hooks before and after receive the arguments of the method, hooks around receive the original first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_ets.patches import uses
from sglang_ets.patches.record import Patch

from sglang_ets.wire import RESULT_KEY

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
SAMPLER = "sglang.srt.layers.sampler.Sampler.forward"
STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"


def load_prm(result: Any, scheduler: Any) -> Any:
    from sglang_ets.engine.startup import make_coordinator

    scheduler.ets = make_coordinator(scheduler)
    return result


def allocate_prm_pools(scheduler: Any) -> None:
    scheduler.ets.prm.init_memory_pools()


def admit_search(original: Callable[..., Any], scheduler: Any, req: Any, is_retracted: bool = False) -> Any:
    if scheduler.ets.admit(req, is_retracted):
        return None
    return original(scheduler, req, is_retracted)


def bound_queue(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    if scheduler.max_queued_requests is None or not scheduler.ets.searches:
        return original(scheduler, recv_req)
    return scheduler.ets.bound_queue(partial(original, scheduler, recv_req), recv_req)


def plan_with_forks(original: Callable[..., Any], scheduler: Any, running_batch: Any, last_batch: Any) -> Any:
    if scheduler.ets.searches:
        running_batch = scheduler.ets.before_batch(running_batch)
    return original(scheduler, running_batch=running_batch, last_batch=last_batch)


def after_plan(plan: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> Any:
    if scheduler.ets.searches:
        scheduler.ets.after_plan(plan)
    return plan


def after_batch(result: Any, scheduler: Any, batch: Any, batch_result: Any) -> Any:
    if scheduler.ets.searches:
        scheduler.ets.after_batch(batch, batch_result)
    return result


def run_strands(original: Callable[..., Any], scheduler: Any, batch: Any, pp_proxy_tensors: Any = None) -> Any:
    from sglang_ets.engine.strands import run_batch

    run = partial(original, scheduler, batch, pp_proxy_tensors)
    return run_batch(run, batch.reqs) if scheduler.ets.searches else run()


def draw_for_members(original: Callable[..., Any], sampler: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang_ets.patches.cpu_sampler import draws_further

    from sglang_ets.engine.strands import take_awaited

    draw = take_awaited()
    if draw is None:
        return original(sampler, *args, **kwargs)
    logits_output, info = args[:2]
    return draw.sample(original, sampler, *args, **kwargs, at_once=draws_further(logits_output.next_token_logits, info))


def before_abort(scheduler: Any, recv_req: Any) -> None:
    if scheduler.ets.searches:
        scheduler.ets.before_abort(recv_req)


def after_abort(result: Any, scheduler: Any, recv_req: Any) -> Any:
    if scheduler.ets.searches:
        scheduler.ets.after_abort(recv_req)
    return result


def swallow_child_abort(original: Callable[..., Any], scheduler: Any, abort_req: Any, req: Any) -> Any:
    if scheduler.ets.searches and scheduler.ets.swallow_abort(req):
        return None
    return original(scheduler, abort_req, req)


def busy_while_searching(result: bool, scheduler: Any, *_args: Any, **_kwargs: Any) -> bool:
    return result and not scheduler.ets.searches


def hide_children(original: Callable[..., Any], streamer: Any, reqs: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang_ets.engine.children import without_children

    return original(streamer, without_children(reqs), *args, **kwargs)


def send_result_once(result: bool, _streamer: Any, key: str) -> bool:
    return result or key == RESULT_KEY


HERE = "sglang_ets.patches.scheduler"
UPSTREAM = "none: search inside the scheduler is new"
GOES_WHEN = "sglang offers a policy interface for internal requests"

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{SCHEDULER}.maybe_init_draft_worker",
        kind="after",
        hook=f"{HERE}:load_prm",
        parameters=("self",),
        tested=("e67673ba92619f75",),
        why="the PRM's weights load before the policy model's KV pool is sized",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=uses.PRM_START,
    ),
    Patch(
        target=f"{SCHEDULER}.init_memory_pools",
        kind="before",
        hook=f"{HERE}:allocate_prm_pools",
        parameters=("self",),
        tested=("80c2c3ee86730773",),
        why="the PRM's KV pool is taken before the policy model's, which fills the rest",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=uses.PRM_POOLS,
    ),
    Patch(
        target=f"{SCHEDULER}._add_request_to_queue",
        kind="around",
        hook=f"{HERE}:admit_search",
        parameters=("self", "req", "is_retracted"),
        tested=("a5327a991cfc42d3",),
        why="a request with search_width becomes a search instead of a waiting request",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=(*uses.ADMISSION, *uses.CHILD),
    ),
    Patch(
        target=f"{SCHEDULER}._abort_on_queued_limit",
        kind="around",
        hook=f"{HERE}:bound_queue",
        parameters=("self", "recv_req"),
        tested=("64e932bce563bfb7",),
        why="--max-queued-requests refuses ordinary requests for their own number, and no step of a search",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=uses.QUEUE_LIMIT,
    ),
    Patch(
        target=f"{SCHEDULER}.get_next_batch_to_run",
        kind="around",
        hook=f"{HERE}:plan_with_forks",
        parameters=("self", "running_batch", "last_batch"),
        tested=("a3f44f962b24c1c4",),
        why="finished selections expand before the tick is planned, and their children start in the running batch",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=(*uses.ANSWER, *uses.FORK),
    ),
    Patch(
        target=f"{SCHEDULER}.get_next_batch_to_run",
        kind="after",
        hook=f"{HERE}:after_plan",
        parameters=("self",),
        tested=("a3f44f962b24c1c4",),
        why="locks of a search must not bring the engine to a standstill",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=uses.TICK,
    ),
    Patch(
        target=f"{SCHEDULER}.run_batch",
        kind="around",
        hook=f"{HERE}:run_strands",
        parameters=("self", "batch", "pp_proxy_tensors"),
        tested=("4733119a3bd07522",),
        why="what the further members of a strand draw goes along with the result of the batch",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=uses.STRAND,
    ),
    Patch(
        target=SAMPLER,
        kind="around",
        hook=f"{HERE}:draw_for_members",
        parameters=(
            *("self", "logits_output", "sampling_info", "return_logprob", "top_logprobs_nums", "token_ids_logprobs"),
            *("positions", "logprob_logits"),
        ),
        tested=("23487f00b39b442f",),
        why="nodes of a search that share a row of the batch each draw their own token from its logits",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=uses.STRAND,
    ),
    Patch(
        target=f"{SCHEDULER}.process_batch_result",
        kind="after",
        hook=f"{HERE}:after_batch",
        parameters=("self", "batch", "result"),
        tested=("3dffbb24ecfc01a4",),
        why="a finished child becomes an event of its search",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=(*uses.LEDGER, *uses.CHILD, *uses.ANSWER, *uses.PRM_PASS, *uses.TOKEN_STATES),
    ),
    Patch(
        target=f"{SCHEDULER}.abort_request",
        kind="before",
        hook=f"{HERE}:before_abort",
        parameters=("self", "recv_req"),
        tested=("c1f592343634270e",),
        why="the client's request is in no queue, so its abort must reach the search",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=uses.ABORT,
    ),
    Patch(
        target=f"{SCHEDULER}.abort_request",
        kind="after",
        hook=f"{HERE}:after_abort",
        parameters=("self", "recv_req"),
        tested=("c1f592343634270e",),
        why="a search whose last child was aborted is forgotten at once",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        uses=uses.ABORT,
    ),
    Patch(
        target=f"{SCHEDULER}.send_abort_output",
        kind="around",
        hook=f"{HERE}:swallow_child_abort",
        parameters=("self", "abort_req", "req"),
        tested=("0aac912492878d5d",),
        why="the tokenizer manager does not know the children of a search",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
    ),
    Patch(
        target=f"{SCHEDULER}.is_fully_idle",
        kind="after",
        hook=f"{HERE}:busy_while_searching",
        parameters=("self",),
        tested=("7a9bf4f94c7c3a5c",),
        why="a cache flush or shutdown must not pass under a search between two levels",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
    ),
    Patch(
        target=f"{STREAMER}._stream_output_generation",
        kind="around",
        hook=f"{HERE}:hide_children",
        parameters=("self", "reqs", "return_logprob", "skip_req", "is_idle_batch"),
        tested=("0bcf2895e4fdc014",),
        why="output of children is not for clients",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
    ),
    Patch(
        target=f"{STREAMER}.is_request_level_customized_info_key",
        kind="after",
        hook=f"{HERE}:send_result_once",
        parameters=("self", "key"),
        tested=("2e40a83c7e6a41cf",),
        why="the result of a search is one value of the request, not one per token",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
    ),
)
