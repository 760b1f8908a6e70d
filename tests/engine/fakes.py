"""A scheduler without a model, and a PRM without weights, for tests of the wiring.

`FakeScheduler` has a real radix cache and allocator, sglang's own requests, and the order of sglang's loop with our hooks in
their places; what its children generate comes from a script. `ScriptedPrm` scores by a function of the step's text.
"""

from __future__ import annotations

import copy
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.selection import SelectionPolicy
from sglang_ets.engine.children import ChildReq, Member, without_children
from sglang_ets.engine.coordinator import SearchCoordinator
from sglang_ets.engine.forks import ForkRoom, Forks
from sglang_ets.engine.strands import DRAW_KEY, Draw
from sglang_ets.prm.ranks import ONE_RANK, Ranks
from sglang_ets.prm.steps import PrmError, ScoreJob, StepScore
from sglang_ets.wire import CUSTOM_KEY, RESULT_KEY

DELIMITER = "\n"
EOS = 256
VOCAB = 257
EMBEDDING_DIM = 8
SETTINGS: dict[str, Any] = {"max_width": 256, "algorithm": "rebase", "step_delimiter": DELIMITER, "max_steps": 6}
SETTINGS |= {"max_running": None, "max_waiting": 8, "max_running_steps": None, "kv_pressure": 0.0, "forks": "decode"}


class ByteTokenizer:
    """A token is a byte of UTF-8; EOS has no text."""

    eos_token_id = EOS
    additional_stop_token_ids = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i != EOS).decode("utf-8", "replace")


def tokens(text: str, *, ends: bool = False) -> list[int]:
    """What a child generates: the bytes of a text, and EOS if the trajectory ends."""
    return [*text.encode(), *([EOS] if ends else [])]


Script = Callable[[ChildReq], Sequence[int]]  # a child -> all tokens that it would generate without a limit


def given(req: Any) -> Sequence[int]:
    """What a request continues: the prompt, and the steps before a child's."""
    in_outputs = req.output_ids[: req.num_given] if isinstance(req, ChildReq | DrawnFor) else ()
    return [*req.origin_input_ids, *in_outputs]


def three_steps(child: ChildReq) -> Sequence[int]:
    """Steps `a=N`, and at the third an answer: a different number for each seed."""
    depth = bytes(given(child)).count(DELIMITER.encode())
    number = (child.sampling_params.sampling_seed or 0) % 10
    return tokens(f"the answer is {number}", ends=True) if depth == 3 else tokens(f"a={number}{DELIMITER}")


def state_after(ids: Sequence[int]) -> NDArray[np.float32]:
    """float32[2]: a hidden state that tells what stands before it, in numbers whose sums are exact."""
    return np.array([zlib.crc32(np.array(ids, dtype="<u2").tobytes()) % 4093, len(ids)], dtype=np.float32)


class FakeBatch:
    def __init__(self, reqs: list[Any] | None = None) -> None:
        self.reqs = reqs or []
        self.batch_is_full = False
        self.forward_mode = ForwardMode.DECODE

    def is_empty(self) -> bool:
        return not self.reqs

    def filter_batch(self) -> None:
        self.reqs = [req for req in self.reqs if not req.finished()]

    def merge_batch(self, other: FakeBatch) -> None:
        self.reqs = self.reqs + other.reqs


@dataclass
class Sent:
    """One output for a client."""

    rid: str
    finished: dict[str, Any] | None  # None: a report on the way
    info: dict[str, Any]


class FakeStreamer:
    """Keeps what clients would get; children are hidden from them as in the server."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []

    def stream_output(self, reqs: Sequence[Any], _return_logprob: bool) -> None:
        for req in without_children(reqs):
            reason = req.finished_reason
            info = (req.customized_info or {}).get(RESULT_KEY, [{}])[-1]
            self.sent.append(Sent(req.rid, reason.to_json() if reason else None, info))

    def responses(self, rid: str) -> list[Sent]:
        return [sent for sent in self.sent if sent.rid == rid and sent.finished is not None]

    def reports(self, rid: str) -> list[dict[str, Any]]:
        return [sent.info for sent in self.sent if sent.rid == rid and sent.finished is None]


class FakeScheduler:
    """Queue, KV pool, radix cache and output of a scheduler. `tick` is one round of its loop."""

    def __init__(self, script: Script = three_steps, pool_tokens: int = 20_000, tokens_per_tick: int = 10_000) -> None:
        rows = ReqToTokenPool(size=300, max_context_len=512, device="cpu", enable_memory_saver=False)
        self.req_to_token_pool = rows
        self.pool_tokens = self.max_total_num_tokens = pool_tokens
        self.token_to_kv_pool_allocator = TokenToKVPoolAllocator(pool_tokens, torch.float32, "cpu", None, False)
        self.tree_cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=rows,
                token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
                page_size=1,
                tree_components=(ComponentType.FULL,),
                tree_core_backend="python",
            )
        )
        self.page_size = 1
        self.enable_hierarchical_cache = self.enable_hisparse = False
        self.spec_algorithm = SpeculativeAlgorithm.NONE
        self.model_config = SimpleNamespace(is_encoder_decoder=False)
        self.new_token_ratio_tracker = SimpleNamespace(current=1.0)
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(sampler=object.__new__(Sampler)))
        self.prefilled: list[str] = []  # ids of requests, one for each time they were prefilled
        self.max_running_requests = 1024
        self.max_queued_requests: int | None = None
        self.script = script
        self.tokens_per_tick = tokens_per_tick
        self.server_args = SimpleNamespace(_ets=dict(SETTINGS))
        self.metrics_collector_context = SimpleNamespace(current_scheduler_metrics_enabled=False)
        self.output_streamer = FakeStreamer()
        self.waiting_queue: list[Any] = []
        self.running_batch = FakeBatch()
        self.last_batch: FakeBatch | None = None
        self.processed_tokens_counter = 0
        self.has_valid_priorities = True
        self.released: list[str] = []  # ids of requests that were refused for their priority
        self.aborted: list[str] = []  # ids whose abort went to the tokenizer manager
        self.caches_last_token = False  # as the overlap schedule does, which sees the end of a step one tick late
        self.overlaps = False
        self.num_computed = 0  # tokens drawn by rows of the batch
        self._in_flight: Launched | None = None
        self.retracted: list[Any] = []  # since the last plan; they wait after the next
        self.holds_back: Callable[[ChildReq], bool] = lambda child: False  # children that are not let out of the queue
        self.ets: SearchCoordinator

    # ---- what the coordinator calls ----

    def _set_or_validate_priority(self, _req: Any) -> bool:
        return self.has_valid_priorities

    def _release_aborted_request(self, req: Any) -> None:
        self.released.append(req.rid)

    def abort_request(self, recv_req: AbortReq) -> None:
        """As sglang: by the beginning of ids, from the queue at once, and running ones at their next token."""
        if self.ets.searches:
            self.ets.before_abort(recv_req)
        hit = [
            place
            for place, req in enumerate(self.waiting_queue)
            if recv_req.abort_all or req.rid.startswith(recv_req.rid)
        ]
        for place in reversed(hit):  # a search that ends over one of them changes the queue
            req = self.waiting_queue.pop(place)
            if not (self.ets.searches and self.ets.swallow_abort(req)):
                self.aborted.append(req.rid)
        for req in self.running_batch.reqs:
            if not req.finished() and (recv_req.abort_all or req.rid.startswith(recv_req.rid)):
                req.to_finish = FINISH_ABORT()
        if self.ets.searches:
            self.ets.after_abort(recv_req)

    def retract(self, req: Any) -> Any:
        """As sglang does for want of memory: what the request computed is gone, and it waits with the tokens that it has."""
        self.running_batch.reqs = [other for other in self.running_batch.reqs if other is not req]
        self.release(req)
        req.reset_for_retract()
        return req

    def release(self, req: Any) -> None:
        """What the request computed is gone."""
        release_kv_cache(req, self.tree_cache, checkpoint=False)

    # ---- the loop ----

    def add(self, req: Any) -> None:
        """A request arrives."""
        if not self.ets.admit(req, False):
            self.waiting_queue.append(req)

    def tick(self) -> None:
        """Plan, run and report one batch, with our hooks where `patches/scheduler.py` puts them.

        With `overlaps` the batch before is reported while this one runs, as sglang's overlap schedule does.
        """
        if self.ets.searches:
            self.running_batch = self.ets.before_batch(self.running_batch)
        batch = self._plan()
        plan = SimpleNamespace(batch_to_run=batch, running_batch=self.running_batch)
        if self.ets.searches:
            self.ets.after_plan(plan)
        self.waiting_queue += self.retracted
        self.retracted = []
        launched = None if batch is None else self._launch(batch)
        due, self._in_flight = (self._in_flight, launched) if self.overlaps else (launched, None)
        if due is not None:
            self._report(due)
        self.last_batch = batch

    def _launch(self, batch: FakeBatch) -> Launched:
        """Draw the next tokens of every request from its script, and take the slots that computing them needs."""
        draw, others = Draw.of(batch.reqs), list[int]()
        prefixes = [self._prefix(req) for req in batch.reqs]
        tokens = [self._forward(req, others) for req in batch.reqs]
        keeps_states = any(req.return_hidden_states_mode is CaptureHiddenMode.LAST for req in batch.reqs)
        states = torch.stack([torch.from_numpy(state_after(ids)) for ids in prefixes]) if keeps_states else None
        result = SimpleNamespace(logits_output=SimpleNamespace(hidden_states=states))
        if draw is not None:
            draw.tokens = torch.tensor(others)
            setattr(result, DRAW_KEY, draw)
        return Launched(FakeBatch(list(batch.reqs)), tokens, result)

    def _forward(self, req: Any, others: list[int]) -> list[int]:
        members = getattr(req, "members", (None,))
        num_given = getattr(req, "num_given", 0)
        begun = len(req.output_ids) - num_given + self._is_in_flight(req)
        count = 1 if self.overlaps or len(members) > 1 else self.tokens_per_tick
        wanted = self._wanted(req)[begun : begun + count]
        for place in range(len(wanted)):
            self._compute(req, len(req.origin_input_ids) + num_given + begun + place)
        for member in members[1:]:
            others += [*self._wanted(DrawnFor(req, member))[begun : begun + 1], *[0]][:1]
        self.num_computed += len(wanted)
        return wanted

    def _prefix(self, req: Any) -> list[int]:
        """What the request samples its next token behind."""
        own = [*given(req), *req.output_ids[getattr(req, "num_given", 0) :]]
        return [*own, *self._wanted(req)[len(own) - len(given(req)) :][: self._is_in_flight(req)]]

    def _is_in_flight(self, req: Any) -> bool:
        return self._in_flight is not None and any(other is req for other in self._in_flight.batch.reqs)

    def _wanted(self, req: Any) -> list[int]:
        limit = req.sampling_params.max_new_tokens - getattr(req, "num_given", 0)
        return list(self.script(req))[:limit] if limit else []

    def _report(self, launched: Launched) -> None:
        batch = launched.batch
        for req, tokens in zip(batch.reqs, launched.tokens, strict=True):
            if not (req.finished() or req.is_retracted):
                self._extend(req, tokens)
        self.running_batch.filter_batch()
        self.output_streamer.stream_output([req for req in batch.reqs if req.finished()], False)
        if self.ets.searches:
            self.ets.after_batch(batch, launched.result)

    def _extend(self, req: Any, tokens: Sequence[int]) -> None:
        """The request gets these tokens, and may end with one of them."""
        if req.to_finish is not None:
            req.finished_reason, req.to_finish = req.to_finish, None
        for token in tokens:
            if req.finished():
                break
            req.output_ids.append(token)
            req.update_finish_state()
        if not req.finished() and len(req.output_ids) - getattr(req, "num_given", 0) >= len(self._wanted(req)):
            req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))  # the script is at its end
            req.finished_len = len(req.output_ids)
        if req.finished():
            if self.caches_last_token and req.output_ids:
                self._compute(req, req.seqlen)
            release_kv_cache(req, self.tree_cache, checkpoint=True)

    def _plan(self) -> FakeBatch | None:
        """Waiting requests join as long as the pool has room for all that they may compute."""
        self.running_batch.filter_batch()
        reserved = sum(self._need(req) for req in self.running_batch.reqs)
        joining: list[Any] = []
        for req in list(self.waiting_queue):
            need = self._need(req)
            if self._free() < reserved + need or (isinstance(req, ChildReq) and self.holds_back(req)):
                continue
            reserved += need
            self.waiting_queue.remove(req)
            self._prefill(req)
            joining.append(req)
        running = [req for req in self.running_batch.reqs if not self._ends_in_flight(req)]
        self.running_batch = FakeBatch([*running, *joining])
        return self.running_batch if self.running_batch.reqs else None

    def _ends_in_flight(self, req: Any) -> bool:
        """The batch that runs brings its last token, as its length says."""
        return self._is_in_flight(req) and bool(req.next_output_finishes_by_length())

    def _need(self, req: Any) -> int:
        return len(req.origin_input_ids) + int(req.sampling_params.max_new_tokens)

    def _free(self) -> int:
        return int(self.token_to_kv_pool_allocator.available_size() + self.tree_cache.evictable_size())

    def _prefill(self, req: Any) -> None:
        """A row over what is cached of the request and new slots for the rest, as before an extend."""
        self.prefilled.append(req.rid)
        req.is_retracted = False
        req.init_next_round_input(self.tree_cache)
        req.lock = self.tree_cache.lock(req.last_node)
        self.req_to_token_pool.alloc([req])
        size = req.extend_end = len(req.full_untruncated_fill_ids)
        cached = self.tree_cache.path_device_indices(req.last_node)[: req.prefix_len]
        slots = torch.cat([cached, self._slots(size - req.prefix_len)])
        self.req_to_token_pool.write((req.kv.req_pool_idx, slice(0, size)), slots.to(torch.int32))
        req.kv.cache_protected_len = req.kv.cache_inserted_len = req.prefix_len
        req.kv.kv_committed_len = req.kv.kv_allocated_len = size

    def _slots(self, count: int) -> torch.Tensor:
        """New slots, for which what nobody locks may have to go."""
        short = count - self.token_to_kv_pool_allocator.available_size()
        if short > 0:
            self.tree_cache.evict(EvictParams(num_tokens=int(short)))
        slots = self.token_to_kv_pool_allocator.alloc(count)
        assert slots is not None, f"the pool has no {count} slots left"
        return slots

    def _compute(self, req: Any, size: int) -> None:
        """A slot for the last of the request's first `size` tokens, unless its prefill computed it."""
        kv = req.kv
        if kv.kv_allocated_len < size:
            self.req_to_token_pool.write((kv.req_pool_idx, kv.kv_allocated_len), self._slots(1).to(torch.int32))
            kv.kv_committed_len = kv.kv_allocated_len = kv.kv_allocated_len + 1


class DrawnFor:
    """A strand as its script sees it when a further member draws."""

    def __init__(self, child: ChildReq, member: Member) -> None:
        self._child = child
        self.node_id = member.node_id
        self.sampling_params = copy.copy(child.sampling_params)
        self.sampling_params.sampling_seed = member.seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)


@dataclass
class Launched:
    """A batch that runs, with what it draws."""

    batch: FakeBatch
    tokens: list[list[int]]
    result: Any


class FakeForks(Forks):
    """The real rows and locks of forks; a batch is a list. What is held back enters the queue, to be held back there."""

    def admits(self, child: ChildReq, room: ForkRoom) -> bool:
        return not self._scheduler.holds_back(child) and super().admits(child, room)

    def _decode_batch(self, children: Sequence[ChildReq]) -> FakeBatch:
        return FakeBatch(list(children))


@dataclass(eq=False)
class ScriptedPath:
    token_ids: tuple[int, ...]


class ScriptedPrm:
    """A `StepScorer`. `score_of` may return a score, or a `PrmError`, or raise what breaks a whole call.

    One that reads states insists that a job brings those of its step.
    """

    def __init__(
        self, score_of: Callable[[ScoreJob], float | PrmError] | None = None, *, reads_states: bool = False
    ) -> None:
        self.reads_states = reads_states
        self.num_states_read = 0
        self.score_of = score_of or (lambda job: zlib.crc32(bytes(job.step_ids[:-1])) % 1000 / 1000)
        self.locked: dict[int, ScriptedPath] = {}
        self.batches: list[list[str]] = []  # texts of the steps of each call
        self.questions: list[str] = []
        self.refused: str | None = None
        self.pool_tokens = 1_000_000
        self.releases: dict[str, int] = {}  # search id -> locks that it gave up
        self.ended: list[str] = []  # ids of searches
        self.num_forgotten = 0
        self.num_recomputed = 0  # steps scored behind a path whose lock is gone: the path is computed again

    def forget(self) -> None:
        self.num_forgotten += 1

    def refusal(self, prompt_ids: Sequence[int], question: str, max_tokens: int) -> str | None:
        return self.refused

    def num_releases(self, owner: str) -> int:
        return self.releases.get(owner, 0)

    def end_owner(self, owner: str) -> None:
        self.ended.append(owner)

    def open_prompt(self, prompt_ids: Sequence[int], question: str, owner: str) -> ScriptedPath:
        self.questions.append(question)
        return self._lock(tuple(prompt_ids))

    def score(self, jobs: Sequence[ScoreJob]) -> list[Any]:
        self.batches.append([job.step_text for job in jobs])
        for job in jobs if self.reads_states else ():
            self._read_states(job)
        results = [
            self.score_of(job) for job in jobs
        ]  # before any lock is taken, as a call that raises must leave none
        outcomes: list[Any] = []
        for job, result in zip(jobs, results, strict=True):
            self.num_recomputed += id(job.parent) not in self.locked
            if isinstance(result, PrmError):
                outcomes.append(result)
                continue
            rng = np.random.default_rng(zlib.crc32(job.step_text.encode()))
            embedding = rng.standard_normal(EMBEDDING_DIM).astype(np.float32)
            score = StepScore(result, embedding / np.linalg.norm(embedding))
            outcomes.append((score, self._lock(job.parent.token_ids + job.step_ids)))
        return outcomes

    def _read_states(self, job: ScoreJob) -> None:
        states, before = job.states, job.parent.token_ids
        assert states is not None and states.count == len(job.step_ids)
        expected = [state_after([*before, *job.step_ids[:place]]) for place in range(states.count)]
        assert (states.last.tolist(), states.total.tolist()) == (expected[-1].tolist(), sum(expected).tolist())
        self.num_states_read += 1

    def release(self, path: Any) -> None:
        self.locked.pop(id(path), None)

    def drop(self, paths: Sequence[Any]) -> int:
        for path in paths:
            self.release(path)
        return 0

    def stats(self) -> dict[str, Any]:
        return {"locks": len(self.locked)}

    def _lock(self, ids: tuple[int, ...]) -> ScriptedPath:
        path = ScriptedPath(ids)
        self.locked[id(path)] = path
        return path


@dataclass
class World:
    """A scheduler with its coordinator and PRM."""

    scheduler: FakeScheduler = field(default_factory=FakeScheduler)
    prm: ScriptedPrm = field(default_factory=ScriptedPrm)
    policies: dict[str, SelectionPolicy] = field(default_factory=dict)  # in the place of those that the requests name
    ranks: Ranks = ONE_RANK
    revives: bool = False  # it was asked for a search that may go on from pruned leaves

    def __post_init__(self) -> None:
        self.scheduler.ets = SearchCoordinator(
            self.scheduler,  # type: ignore[arg-type]
            self.prm,  # type: ignore[arg-type]
            self.ranks,
            policy_of=self.policy_of,
        )
        self.scheduler.ets._forks = FakeForks(self.scheduler)

    def policy_of(self, config: SearchConfig) -> SelectionPolicy:
        policy: SelectionPolicy = self.policies.get(config.algorithm, config.policy)
        self.revives = self.revives or config.num_pruned_shown > 0
        return policy

    @property
    def ets(self) -> SearchCoordinator:
        return self.scheduler.ets

    def ask(self, rid: str = "pa", prompt: str = "Q: 1+1?\n", **fields: Any) -> Any:
        """A search arrives; `fields` are those of `request`."""
        req = request(rid, prompt, **fields)
        self.scheduler.add(req)
        return req

    def live(self) -> Any:
        """The only search there is."""
        (live,) = self.ets.searches.values()
        return live

    def run(self, limit: int = 20_000) -> None:
        """Until no search is left."""
        for _ in self.ticks(limit):
            pass

    def ticks(self, limit: int = 20_000) -> Iterator[int]:
        """Tick until no search is left, with control after each tick.

        Raises:
            AssertionError: the searches have not ended after `limit` ticks.
        """
        for tick in range(limit):
            if not self.ets.searches:
                return
            self.scheduler.tick()
            yield tick
        raise AssertionError(f"searches after {limit} ticks: {self.ets.describe()['searches']}")

    def answer(self, rid: str = "pa") -> dict[str, Any]:
        """The result of a search that was answered, once."""
        (sent,) = self.scheduler.output_streamer.responses(rid)
        assert sent.finished is not None and sent.finished["type"] == "length", sent
        return sent.info

    def error(self, rid: str = "pa") -> str:
        """The message of a search that has no answer; it came once."""
        return str(self._abort(rid)["message"])

    def status(self, rid: str = "pa") -> int | None:
        """The HTTP status of such a search."""
        status: int | None = self._abort(rid)["status_code"]
        return status

    def _abort(self, rid: str) -> dict[str, Any]:
        (sent,) = self.scheduler.output_streamer.responses(rid)
        assert sent.finished is not None and sent.finished["type"] == "abort", sent
        return sent.finished

    def assert_balanced(self) -> None:
        """No search, no child, no lock in either cache, and no token of KV that nobody accounts for."""
        scheduler = self.scheduler
        assert self.ets.searches == {}
        assert [req.rid for req in scheduler.waiting_queue if isinstance(req, ChildReq)] == []
        assert [req.rid for req in scheduler.running_batch.reqs if isinstance(req, ChildReq)] == []
        assert self.ets.ledger.num_holds == 0
        assert self.prm.locked == {}
        assert self.revives or not self.prm.num_recomputed, "a step is scored while its parent's path is locked"
        assert scheduler.tree_cache.protected_size() == 0
        free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
        assert free == scheduler.pool_tokens
        assert scheduler.req_to_token_pool.available_size() == scheduler.req_to_token_pool.size


def request(
    rid: str,
    prompt: str,
    search: Any = None,
    *,
    stream: bool = False,
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
    custom: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A client's request: a search of width 4 with `settings`, or whatever `search` is; False: an ordinary request."""
    carried = {"search_width": 4, "seed": 1, **settings} if search is None else search
    given = custom or {} if carried is False else {CUSTOM_KEY: carried, **(custom or {})}
    params = SamplingParams(max_new_tokens=max_new_tokens, stop=list(stop), custom_params=given or None)
    tokenizer = ByteTokenizer()
    params.normalize(tokenizer)
    req = Req(rid, prompt, array("q", tokens(prompt)), params, eos_token_ids={EOS}, vocab_size=VOCAB, stream=stream)
    req.tokenizer = tokenizer
    return req
