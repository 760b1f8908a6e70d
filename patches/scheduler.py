"""Hooks on the scheduler: where a search enters the engine, is fed by it and leaves it.

Each hook begins with an O(1) test, so an ordinary request pays nothing; the logic is in `sglang_ets.engine.coordinator`.
Hooks before and after receive the arguments of the method, hooks around receive the original first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_ets.patches.record import Kind, Patch

from sglang_ets.wire import RESULT_KEY

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
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


def before_plan(scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    if scheduler.ets.searches:
        scheduler.ets.before_batch()


def after_plan(plan: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> Any:
    if scheduler.ets.searches:
        scheduler.ets.after_plan(plan)
    return plan


def after_batch(result: Any, scheduler: Any, batch: Any, *_args: Any, **_kwargs: Any) -> Any:
    if scheduler.ets.searches:
        scheduler.ets.after_batch(batch)
    return result


def before_abort(scheduler: Any, recv_req: Any) -> None:
    if scheduler.ets.searches:
        scheduler.ets.before_abort(recv_req)


def after_abort(result: Any, scheduler: Any, _recv_req: Any) -> Any:
    if scheduler.ets.searches:
        scheduler.ets.after_abort()
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
PIN_MOVES = "sglang offers a policy interface for internal requests"


def _patch(target: str, kind: Kind, hook: str, sha256: str, why: str) -> Patch:
    return Patch(target, kind, f"{HERE}:{hook}", sha256, why, "none: search inside the scheduler is new", PIN_MOVES)


PATCHES: tuple[Patch, ...] = (
    _patch(
        f"{SCHEDULER}.maybe_init_draft_worker",
        "after",
        "load_prm",
        "6776fe8af04f95c33f182da4c753a6dbcf7e3474052567e8ad7b8c51826a8019",
        "the PRM's weights load before the policy model's KV pool is sized",
    ),
    _patch(
        f"{SCHEDULER}.init_memory_pools",
        "before",
        "allocate_prm_pools",
        "b6a9b358b271a270b17465381882befc0dc215eaeb40eb0179e20d410b87a758",
        "the PRM's KV pool is taken before the policy model's, which fills the rest",
    ),
    _patch(
        f"{SCHEDULER}._add_request_to_queue",
        "around",
        "admit_search",
        "056a60799b02ac479f90d60196205e9a48eb85bb66210b5a12de9fba98d72b0a",
        "a request with search_width becomes a search instead of a waiting request",
    ),
    _patch(
        f"{SCHEDULER}.get_next_batch_to_run",
        "before",
        "before_plan",
        "34f30fd4dfb13d741ef8aae209ca7de67fa00846ee58ffa7706fc3b12890fae0",
        "finished selections expand before the tick is planned",
    ),
    _patch(
        f"{SCHEDULER}.get_next_batch_to_run",
        "after",
        "after_plan",
        "34f30fd4dfb13d741ef8aae209ca7de67fa00846ee58ffa7706fc3b12890fae0",
        "locks of a search must not bring the engine to a standstill",
    ),
    _patch(
        f"{SCHEDULER}.process_batch_result",
        "after",
        "after_batch",
        "726305f46a979a47a7bc334d9d8b98122943adf36da5a977ce2292c21ff7a8e2",
        "a finished child becomes an event of its search",
    ),
    _patch(
        f"{SCHEDULER}.abort_request",
        "before",
        "before_abort",
        "b16ca1103b1df7f570f453e0e16be33df8b51e69fc874dc8e065f53b4531c547",
        "the client's request is in no queue, so its abort must reach the search",
    ),
    _patch(
        f"{SCHEDULER}.abort_request",
        "after",
        "after_abort",
        "b16ca1103b1df7f570f453e0e16be33df8b51e69fc874dc8e065f53b4531c547",
        "a search whose last child was aborted is forgotten at once",
    ),
    _patch(
        f"{SCHEDULER}.send_abort_output",
        "around",
        "swallow_child_abort",
        "fd50df816ad695e92c7dfcbf53421b55b47007e19a5f8699720edf00cb6adcb9",
        "the tokenizer manager does not know the children of a search",
    ),
    _patch(
        f"{SCHEDULER}.is_fully_idle",
        "after",
        "busy_while_searching",
        "de1b97c37c2842d2a486500bcf471d45c2419226bb59cc39834ec094fc5845f4",
        "a cache flush or shutdown must not pass under a search between two levels",
    ),
    _patch(
        f"{STREAMER}._stream_output_generation",
        "around",
        "hide_children",
        "830e84a497de644a3f3e66163ae5212798ba653d6dabb315a41f2735d6333d8b",
        "output of children is not for clients",
    ),
    _patch(
        f"{STREAMER}.is_request_level_customized_info_key",
        "after",
        "send_result_once",
        "a9870e9137d5297479bc3b38dc555035a385151376eada97fbf86186247528a9",
        "the result of a search is one value of the request, not one per token",
    ),
)
