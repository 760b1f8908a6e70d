"""Internal requests: the sglang requests behind the children of a search node."""

from __future__ import annotations

import copy
import hashlib
import itertools
import uuid
import zlib
from array import array
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_STR,
    FINISH_MATCHED_TOKEN,
    FINISHED_MATCHED_REGEX,
    Req,
)

from sglang_ets.core.tree import NOT_FINITE

SEED_RANGE = 2**61 - 1
NAN_STOP = "NaN happened"  # what sglang reports as the matched stop string when the logits are not finite

# sglang aborts by the beginning of an id. No client knows this one, so none of its ids or aborts begins like ours.
_PROCESS = f"\x00ets-{uuid.uuid4().hex}"
_numbers = itertools.count(1)


def new_search_id() -> str:
    """An id for a search of this process: the ids of its children, and of no other request, begin with it."""
    return f"{_PROCESS}/{next(_numbers)}/"


@dataclass(frozen=True)
class ChildSpec:
    """What all children of one search share."""

    search_id: str
    parent: Req  # the client's request: prompt, sampling parameters, tokenizer, keys of the cache
    seed: int
    step_delimiter: tuple[str | int, ...]

    def child_id(self, node_id: int) -> str:
        return f"{self.search_id}{node_id}"


class ChildReq(Req):
    """The request that samples one step (or, with `node_id` 0, only brings the prompt into the cache)."""

    any_made: ClassVar[bool] = False  # false until this process runs its first search
    spec: ChildSpec
    node_id: int


@dataclass(frozen=True)
class StepEnd:
    """How a child ended, in the words of the search."""

    kind: Literal["step", "stop", "length", "failed"]
    reason: str = ""
    stop_text: str | None = None  # a stop string of the client: the answer ends before it


def make_child(
    spec: ChildSpec, node_id: int, place: tuple[int, ...], token_ids: Sequence[int], max_new_tokens: int
) -> ChildReq:
    """A request that continues `prompt + token_ids` by one step, that of the node at `place`. It is not queued yet."""
    parent = spec.parent
    child = ChildReq(
        spec.child_id(node_id),
        "",
        parent.origin_input_ids + array("q", token_ids),
        _step_params(spec, place, max_new_tokens),
        eos_token_ids=parent.eos_token_ids,
        vocab_size=parent.vocab_size,
        priority=parent.priority,
        cache_salt=parent.cache_salt,
        extra_key=parent.extra_key,
        metrics_collector=parent.metrics_collector,
    )
    child.tokenizer = parent.tokenizer
    child.logprob_start_len = -1
    child.spec = spec
    child.node_id = node_id
    ChildReq.any_made = True
    return child


def _step_params(spec: ChildSpec, place: tuple[int, ...], max_new_tokens: int) -> Any:
    """The client's sampling parameters with the step delimiters as stops beside the client's own."""
    params = copy.copy(spec.parent.sampling_params)
    params.custom_params = None
    params.n = 1
    params.max_new_tokens = max_new_tokens
    params.sampling_seed = child_seed(spec.seed, spec.parent.origin_input_ids, place)
    if max_new_tokens == 0:
        return params
    strings = [d for d in spec.step_delimiter if isinstance(d, str)]
    token_ids = {d for d in spec.step_delimiter if isinstance(d, int)}
    params.stop_strs = [*(params.stop_strs or []), *strings]
    lengths = [len(spec.parent.tokenizer.encode(s, add_special_tokens=False)) for s in strings]
    params.stop_str_max_len = max([params.stop_str_max_len, *lengths])
    params.stop_token_ids = (params.stop_token_ids or set()) | token_ids or None
    return params


def child_seed(seed: int, prompt_ids: array[int], place: tuple[int, ...]) -> int:
    """Sampling seed of the node at `place` (see `SearchTree.place`), which holds whenever and beside whatever it is drawn.

    The prompt is in it: searches of one seed on two prompts draw independently.
    """
    words = np.array([seed, zlib.crc32(prompt_ids), *place], dtype="<u8")
    return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "little") % SEED_RANGE


def step_end(child: ChildReq) -> StepEnd:
    """Read how a finished child ended. A client's own stop goes before a delimiter of the same text."""
    reason = child.finished_reason
    own_params = child.spec.parent.sampling_params
    if isinstance(reason, FINISH_ABORT):
        return StepEnd("failed", reason.message)
    if isinstance(reason, FINISH_LENGTH):
        return StepEnd("length")
    if isinstance(reason, FINISH_MATCHED_TOKEN):
        is_own = reason.matched in (own_params.stop_token_ids or ())
        return StepEnd("step" if reason.matched in child.spec.step_delimiter and not is_own else "stop")
    if isinstance(reason, FINISH_MATCHED_STR):
        if reason.matched == NAN_STOP:
            return StepEnd("failed", NOT_FINITE)
        if reason.matched in (own_params.stop_strs or ()):
            return StepEnd("stop", stop_text=reason.matched)
        return StepEnd("step")
    if isinstance(reason, FINISHED_MATCHED_REGEX):
        return StepEnd("stop", stop_text=reason.matched)
    return StepEnd("failed", f"unknown finish reason {reason!r}")


def children_in_engine(scheduler: Any, ids: Set[str]) -> list[ChildReq]:
    """The children with these ids that wait or run, in the order of their nodes."""
    batches = [batch for batch in (scheduler.running_batch, scheduler.last_batch) if batch is not None]
    reqs = [*scheduler.waiting_queue, *(req for batch in batches for req in batch.reqs)]
    children = {req.node_id: req for req in reqs if isinstance(req, ChildReq) and req.rid in ids}
    return [children[node_id] for node_id in sorted(children)]


def without_children(reqs: Sequence[Any]) -> Sequence[Any]:
    """The requests whose output goes to a client; the very same list in a process that never ran a search.

    With the overlap schedule a finished child shows once more after its search is gone, so "no live search" is no test.
    """
    return [req for req in reqs if not isinstance(req, ChildReq)] if ChildReq.any_made else reqs
