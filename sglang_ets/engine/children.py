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
from numpy.typing import NDArray
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_STR,
    FINISH_MATCHED_TOKEN,
    FINISHED_MATCHED_REGEX,
    Req,
)
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

from sglang_ets.core.tree import NOT_FINITE
from sglang_ets.kv import Hold
from sglang_ets.prm.ranks import ONE_RANK, Ranks
from sglang_ets.prm.steps import SampledStates

SEED_RANGE = 2**61 - 1
NAN_STOP = "NaN happened"  # what sglang reports as the matched stop string when the logits are not finite


class SearchIds:
    """Ids for searches: the ids of a search's children, and of no other request, begin with it. On all ranks they are the same.

    sglang aborts by the beginning of an id. No client knows this one, so none of its ids or aborts begins like ours.
    """

    def __init__(self, ranks: Ranks = ONE_RANK) -> None:
        self._process = f"\x00ets-{ranks.from_first(uuid.uuid4().hex)}"
        self._numbers = itertools.count(1)

    def new(self) -> str:
        return f"{self._process}/{next(self._numbers)}/"


@dataclass(frozen=True)
class ChildSpec:
    """What all children of one search share."""

    search_id: str
    parent: Req  # the client's request: prompt, sampling parameters, tokenizer, keys of the cache
    seed: int
    step_delimiter: tuple[str | int, ...]
    reads_states: bool = False  # whoever scores steps reads the hidden states that their tokens were sampled from

    def child_id(self, node_id: int) -> str:
        """No other child's id begins with it: whoever aborts this one, by its id, hits no sibling."""
        return f"{self.search_id}{node_id}/"

    def member(self, node_id: int, place: tuple[int, ...]) -> Member:
        """The node at `place` (see `SearchTree.place`), as one that draws."""
        return Member(node_id, child_seed(self.seed, self.parent.origin_input_ids, place))


@dataclass(eq=False)
class Member:
    """One node of those for whose step a request stands."""

    node_id: int  # negative: there is no such node yet, see `guesses`
    seed: int  # of its draws


class ChildReq(Req):
    """The request that samples a step (or, with `node_id` 0, only brings the prompt into the cache).

    It stands for one node, or for several whose tokens have been equal so far: see `strands`.
    """

    any_made: ClassVar[bool] = False  # false until this process runs its first search
    spec: ChildSpec
    members: tuple[Member, ...]
    num_seen: int = 0  # of its output ids, after the last batch
    source: Hold | None = None  # the path that it continues, if it may share its slots; held by whoever made the child
    num_given: int = 0  # of its output ids, that stand before the step: the first input of a fork
    num_computed: int = 0  # tokens that batches computed for it
    states: SampledStates | None = None  # that the tokens of its step were sampled from, if they are read

    @property
    def node_id(self) -> int:
        """The first of its nodes, which it never loses."""
        return self.members[0].node_id

    @property
    def node_ids(self) -> tuple[int, ...]:
        return tuple(member.node_id for member in self.members)

    @property
    def step_ids(self) -> tuple[int, ...]:
        """What of the step is generated, with its delimiter once it has ended."""
        return tuple(self.output_ids_through_stop[self.num_given :])

    def add_state(self, state: NDArray[np.float32]) -> None:
        """It has got a token, sampled from this hidden state (float32[H])."""
        self.states = SampledStates.first(state) if self.states is None else self.states.plus(state)

    def _stop_match_tail_len(self, new_accepted_len: int) -> int:
        """sglang looks for stop strings in so many of the last tokens: in none from before the step."""
        num_last: int = super()._stop_match_tail_len(new_accepted_len)
        return min(num_last, len(self.output_ids) - self.num_given)


@dataclass(frozen=True)
class StepEnd:
    """How a child ended, in the words of the search."""

    kind: Literal["step", "stop", "length", "failed"]
    reason: str = ""
    stop_text: str | None = None  # a stop string of the client: the answer ends before it


def make_child(
    spec: ChildSpec,
    members: Sequence[Member],
    token_ids: Sequence[int],
    max_new_tokens: int,
    source: Hold | None = None,
) -> ChildReq:
    """A request that continues `prompt + token_ids` by one step, that of each member. It is not queued yet.

    With a `source`, the path of these tokens, its last input stands among its outputs, as in a request that decodes.
    """
    given = spec.parent.origin_input_ids + array("q", token_ids)
    num_given = int(source is not None and len(given) > 1)
    params = _step_params(spec, members[0].seed, max_new_tokens + num_given)
    child = _request(spec, members, given[: len(given) - num_given], params)
    if num_given:
        child.source, child.num_given = source, num_given
        child.output_ids.extend(given[-num_given:])
    child.num_seen = num_given
    return child


def make_parted(child: ChildReq, members: Sequence[Member], token: int, source: Hold) -> ChildReq:
    """A request for members that drew `token` where the others of `child` drew its last one; `source`: the path before it."""
    params = copy.copy(child.sampling_params)
    params.sampling_seed = members[0].seed
    parted = _request(child.spec, members, child.origin_input_ids, params)
    parted.output_ids.extend([*child.output_ids[:-1], token])
    parted.source, parted.num_given, parted.num_seen = source, child.num_given, len(parted.output_ids)
    parted.states = child.states  # both tokens were sampled from the last one
    return parted


def _request(spec: ChildSpec, members: Sequence[Member], input_ids: array[int], params: Any) -> ChildReq:
    parent = spec.parent
    child = ChildReq(
        spec.child_id(members[0].node_id),
        "",
        input_ids,
        params,
        eos_token_ids=parent.eos_token_ids,
        vocab_size=parent.vocab_size,
        priority=parent.priority,
        cache_salt=parent.cache_salt,
        extra_key=parent.extra_key,
        metrics_collector=parent.metrics_collector,
    )
    child.tokenizer = parent.tokenizer
    child.logprob_start_len = -1
    if spec.reads_states and params.max_new_tokens:
        child.return_hidden_states_mode = CaptureHiddenMode.LAST  # kept by the batch; sglang itself returns none
    child.spec = spec
    child.members = tuple(members)
    ChildReq.any_made = True
    return child


def _step_params(spec: ChildSpec, seed: int, max_new_tokens: int) -> Any:
    """The client's sampling parameters with the step delimiters as stops beside the client's own."""
    params = copy.copy(spec.parent.sampling_params)
    params.custom_params = None
    params.n = 1
    params.max_new_tokens = max_new_tokens
    params.sampling_seed = seed
    if max_new_tokens == 0:
        return params
    strings = [d for d in spec.step_delimiter if isinstance(d, str)]
    token_ids = {d for d in spec.step_delimiter if isinstance(d, int)}
    params.stop_strs = [*(params.stop_strs or []), *strings]
    lengths = [len(spec.parent.tokenizer.encode(s, add_special_tokens=False)) for s in strings]
    params.stop_str_max_len = max([params.stop_str_max_len, *lengths])
    params.stop_token_ids = (params.stop_token_ids or set()) | token_ids or None
    return params


def counts_outputs(params: Any) -> bool:
    """Whether what a request draws depends on how many of its tokens are outputs, so that no input may stand among them."""
    return bool(
        params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0 or params.min_new_tokens
    )


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
