"""The PRM as a second model in the scheduler process: own runtime context, own KV pool, own radix cache.

A step is scored once, and only its tokens are extended, beside one token of what came before (whose hidden state the first
token of the step needs). Every call runs on the scheduler's thread.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.managers.overlap_utils import resolve_forward_inputs
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
from sglang.srt.runtime_context import SpawnRanks, create_context, get_context, get_device, get_parallel, use_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.utils import broadcast_pyobj
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_ets.kv import Hold, RadixLedger
from sglang_ets.prm import models
from sglang_ets.prm.choose import AUTO, choose_format
from sglang_ets.prm.formats import Head, PrmFormat, StepProbability, StepTokens
from sglang_ets.prm.readout import embed_steps, read_score

logger = logging.getLogger(__name__)

DEFAULT_POOL_TOKENS = 20_000
MAX_BATCH_TOKENS = 8192  # extended in one forward pass at most, to bound the activations
OWNER = "prm"


@dataclass(frozen=True)
class PrmSettings:
    """What the flags say about the PRM."""

    model_path: str
    format: str = AUTO
    max_total_tokens: int | None = None  # size of its KV pool; None: DEFAULT_POOL_TOKENS


class PrmError(RuntimeError):
    """A step that the PRM could not score; returned, not raised."""


@dataclass(frozen=True)
class StepScore:
    """What the PRM says about one step."""

    score: float  # 0..1
    embedding: NDArray[np.float32]  # float32[H], unit norm


@dataclass(eq=False)
class PrmPath:
    """The PRM's side of one trajectory: its tokens with the prompt, and the lock on their KV."""

    token_ids: tuple[int, ...]
    hold: Hold


@dataclass(frozen=True)
class ScoreJob:
    """One finished step to score."""

    parent: PrmPath
    parent_score: float | None
    step_ids: tuple[int, ...]
    step_text: str
    depth: int


@dataclass(frozen=True)
class _Sequence:
    """Tokens to bring into the cache; the hidden states from `reuse_tokens` on are wanted."""

    token_ids: tuple[int, ...]
    reuse_tokens: int


@dataclass(frozen=True)
class _Reading:
    """A step in the PRM's tokens, and what came before it."""

    job: ScoreJob
    tokens: StepTokens

    @property
    def kept_ids(self) -> tuple[int, ...]:
        return self.job.parent.token_ids + self.tokens.path

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.job.parent.token_ids + self.tokens.read


class _PrmReq(Req):
    """A request whose cached prefix may be reused only so far that all wanted hidden states are computed."""

    reuse_tokens: int

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return min(super()._compute_max_prefix_len(input_len), self.reuse_tokens)


class PrmEngine:
    """Scores steps. Owns the PRM's weights, KV pool and radix cache."""

    def __init__(
        self,
        context: Any,
        worker: TpModelWorker,
        spec: PrmFormat,
        tokenizer: Any,
        has_policy_tokens: bool,
        has_policy_weights: bool,
    ) -> None:
        self._context = context
        self._worker = worker
        self._spec = spec
        self._tokenizer = tokenizer
        self._has_policy_tokens = has_policy_tokens  # the PRM reads the policy model's own token ids
        self._has_policy_weights = has_policy_weights
        self._num_requests = 0
        self._tp_group: Any = None
        # Over the life of the server: tokens computed, and what scoring every trajectory from its start would have cost.
        self.tokens_extended = 0
        self.tokens_if_rescored = 0

    @classmethod
    def load(cls, scheduler: Any, settings: PrmSettings) -> PrmEngine:
        """Load the weights, before the policy model's KV pool is sized.

        A PRM at the model path shares the policy model's weights.

        Raises:
            SystemExit: the format is unknown, or does not work on this server.
        """
        policy = scheduler.server_args
        tokenizer = get_tokenizer(settings.model_path, trust_remote_code=policy.trust_remote_code)
        spec = choose_format(settings.model_path, settings.format, tokenizer)
        if not isinstance(spec.readout, Head) and get_parallel().tp_size > 1:
            raise SystemExit(f"--prm-format {spec.name} needs --tp 1, because the head's rows are split over ranks")
        is_shared = settings.model_path == policy.model_path
        context, worker = _start_worker(scheduler, settings, is_shared)
        if is_shared:
            worker.model_runner.model = scheduler.tp_worker.model_runner.model
        is_same = is_shared or tokenizer.get_vocab() == scheduler.tokenizer.get_vocab()
        return cls(context, worker, spec, tokenizer, spec.reads_policy_tokens and is_same, is_shared)

    def init_memory_pools(self) -> None:
        """Allocate the PRM's KV pool and make its radix cache."""
        with use_context(self._context):
            self._worker.alloc_memory_pool()
            self._worker.init_attention_backends()
            self._worker.init_cuda_graphs()
            self._rows, self._allocator = self._worker.get_memory_pool()
            self._cache = UnifiedRadixCache(
                CacheInitParams(
                    disable=False,
                    req_to_token_pool=self._rows,
                    token_to_kv_pool_allocator=self._allocator,
                    page_size=self._worker.model_runner.page_size,
                    tree_components=(ComponentType.FULL,),
                )
            )
            if get_parallel().tp_size > 1:
                self._tp_group = self._worker.get_tp_group()
        self._ledger = RadixLedger(self._cache, self._allocator)
        logger.info("PRM ready: format %s, KV pool of %d tokens", self._spec.name, self._allocator.available_size())

    def open_prompt(self, prompt_ids: Sequence[int], question: str) -> PrmPath:
        """Bring the prompt into the PRM's cache, once per search.

        Raises:
            PrmError: the prompt does not fit.
        """
        ids = tuple(prompt_ids) if self._has_policy_tokens else self._spec.layout.prompt(question)
        with use_context(self._context), torch.no_grad():
            done = self._extend([_Sequence(ids, len(ids))])
        if not done:
            raise self._too_large(ids)
        return PrmPath(ids, self._ledger.hold(OWNER, done[0][0]))

    def score(self, jobs: Sequence[ScoreJob]) -> list[tuple[StepScore, PrmPath] | PrmError]:
        """Score finished steps, in as few forward passes as the free KV allows. Outcomes in the order of the jobs."""
        readings = [_Reading(job, self._tokens(job)) for job in jobs]
        self.tokens_if_rescored += sum(len(reading.token_ids) for reading in readings)
        by_tokens: dict[tuple[int, ...], list[int]] = {}
        for place, reading in enumerate(readings):
            by_tokens.setdefault(reading.token_ids, []).append(place)
        outcomes: list[tuple[StepScore, PrmPath] | PrmError] = [PrmError("not scored")] * len(jobs)
        waiting = list(by_tokens)
        with use_context(self._context), torch.no_grad():
            while waiting:
                first = [readings[by_tokens[ids][0]] for ids in waiting]
                done = self._extend([_Sequence(r.token_ids, len(r.job.parent.token_ids) - 1) for r in first])
                if not done:
                    for place in by_tokens[waiting.pop(0)]:
                        outcomes[place] = self._too_large(readings[place].token_ids)
                    continue
                scores = self._read(first[: len(done)], [hidden for _, hidden in done])
                for reading, score, (node, _) in zip(first, scores, done, strict=False):
                    for place in by_tokens[reading.token_ids]:  # identical steps share the work, each with its own lock
                        outcomes[place] = (score, PrmPath(reading.kept_ids, self._ledger.hold(OWNER, node)))
                del waiting[: len(done)]
        return outcomes

    def release(self, path: PrmPath) -> None:
        """Unlock; the KV stays cached until it is needed. Idempotent."""
        self._ledger.release(path.hold)

    def drop(self, paths: Sequence[PrmPath]) -> int:
        """Unlock and free at once what only these paths hold. Returns the tokens freed. Idempotent."""
        return self._ledger.drop(path.hold for path in paths)

    @property
    def pool_tokens(self) -> int:
        """Tokens that the PRM's KV pool holds."""
        return int(self._allocator.size)

    def stats(self) -> dict[str, Any]:
        """For `/server_info`."""
        return {
            "format": self._spec.name,
            "shares_policy_weights": self._has_policy_weights,
            "shares_policy_tokens": self._has_policy_tokens,
            "held_kv_tokens": self._ledger.held_tokens(),
            "locks": self._ledger.num_holds,
            "tokens_extended": self.tokens_extended,
            "tokens_if_rescored": self.tokens_if_rescored,
        }

    # ---- one forward pass ----

    def _extend(self, wanted: Sequence[_Sequence]) -> list[tuple[int, torch.Tensor]]:
        """Compute as many of the sequences, from the first on, as fit.

        Returns:
            Per computed sequence the radix node where it ends and the hidden states float[n, H] of the extended tokens.
            The nodes are not locked: the caller does that before anything else is allocated.
        """
        reqs = self._fitting_requests(wanted)
        if not reqs:
            return []
        runner = self._worker.model_runner
        batch = ScheduleBatch.init_new(
            reqs, self._rows, self._allocator, self._cache, self._worker.model_config, False, SpeculativeAlgorithm.NONE
        )
        batch.prepare_for_extend()
        resolve_forward_inputs(batch, None)
        forward = ForwardBatch.init_new(
            batch, runner, return_hidden_states_before_norm=False, capture_hidden_mode=CaptureHiddenMode.FULL
        )
        hidden = runner.forward(forward).logits_output.hidden_states
        lengths = [int(length) for length in batch.extend_lens]
        self.tokens_extended += sum(lengths)
        for req in reqs:
            req.finished_reason, req.finished_len = FINISH_LENGTH(length=0), 0
            release_kv_cache(req, self._cache, checkpoint=True)
        return [(req.last_node, piece) for req, piece in zip(reqs, hidden.split(lengths), strict=True)]

    def _fitting_requests(self, wanted: Sequence[_Sequence]) -> list[_PrmReq]:
        """Requests with their cached prefix locked, as long as new tokens and rows are left for them."""
        reqs: list[_PrmReq] = []
        new_tokens = 0
        for sequence in wanted[: self._rows.available_size()]:
            req = self._request(sequence)
            req.lock = self._cache.lock(req.last_node)
            grown = new_tokens + len(sequence.token_ids) - req.prefix_len + self._cache.page_size
            free = self._allocator.available_size() + self._cache.evictable_size()
            if grown > free or (reqs and grown > MAX_BATCH_TOKENS):
                self._cache.unlock(req.lock)
                break
            new_tokens = grown
            reqs.append(req)
        return reqs

    def _request(self, sequence: _Sequence) -> _PrmReq:
        params = SamplingParams(max_new_tokens=0)
        params.normalize(None)
        self._num_requests += 1
        req = _PrmReq(
            f"prm-{self._num_requests}",
            "",
            array("q", sequence.token_ids),
            params,
            vocab_size=self._worker.model_config.vocab_size,
            eos_token_ids=set(),
        )
        req.logprob_start_len = -1
        req.reuse_tokens = sequence.reuse_tokens
        req.init_next_round_input(self._cache)
        req.extend_end = len(req.full_untruncated_fill_ids)
        return req

    def _tokens(self, job: ScoreJob) -> StepTokens:
        return StepTokens(job.step_ids) if self._has_policy_tokens else self._spec.layout.step(job.step_text, job.depth)

    def _read(self, readings: Sequence[_Reading], hidden: Sequence[torch.Tensor]) -> list[StepScore]:
        """Scores and embeddings of steps whose hidden states (and those of the token before) were just computed."""
        own = [piece[len(piece) - len(r.tokens.read) :] for piece, r in zip(hidden, readings, strict=True)]
        words = [states[r.tokens.words] for states, r in zip(own, readings, strict=True)]
        embeddings = embed_steps(torch.cat(words), [len(states) for states in words]).cpu().numpy()
        scores = []
        for reading, piece, states in zip(readings, hidden, own, strict=True):
            before = piece[len(piece) - len(states) - 1 : -1]
            token_ids, parent_score = reading.tokens.read, reading.job.parent_score
            model, first = self._worker.model_runner.model, self._first_scored(token_ids)
            scores.append(read_score(self._spec.readout, model, before, states, token_ids, first, parent_score))
        if self._tp_group is not None:
            # Reductions may differ in the last bit per rank, and every rank must take the same decision.
            scores = broadcast_pyobj(scores, self._tp_group.rank, self._tp_group.cpu_group, src=self._tp_group.ranks[0])
        return [StepScore(score, embedding) for score, embedding in zip(scores, embeddings, strict=True)]

    def _first_scored(self, token_ids: Sequence[int]) -> int:
        readout = self._spec.readout
        if not isinstance(readout, StepProbability) or readout.score_after is None:
            return 0
        return readout.first_scored([self._tokenizer.decode([token]) for token in token_ids])

    def _too_large(self, token_ids: Sequence[int]) -> PrmError:
        free = self._allocator.available_size() + self._cache.evictable_size()
        return PrmError(
            f"the PRM's KV pool has {free} tokens left for a trajectory of {len(token_ids)}; lower search_width or raise "
            "--prm-max-total-tokens"
        )


def _start_worker(scheduler: Any, settings: PrmSettings, is_shared: bool) -> tuple[Any, TpModelWorker]:
    """The PRM's runtime context and model worker. Weights that are shared are not read a second time."""
    models.register()
    main = get_context()
    args = ServerArgs(
        model_path=settings.model_path,
        load_format="dummy" if is_shared else "auto",
        trust_remote_code=scheduler.server_args.trust_remote_code,
        device=get_device().device,
        dtype=scheduler.server_args.dtype,
        attention_backend=scheduler.server_args.attention_backend,
        tp_size=get_parallel().tp_size,
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        max_total_tokens=settings.max_total_tokens or DEFAULT_POOL_TOKENS,
        disable_cuda_graph=True,
        random_seed=scheduler.server_args.random_seed or 1,
    )
    ranks = SpawnRanks(world_rank=get_parallel().tp_rank, dp_rank=main.parallel.dp_rank, gpu_id=get_device().gpu_id)
    context = create_context(args, role="scheduler", ranks=ranks)
    # Process groups exist once per process: the PRM's context borrows those of the policy model.
    groups = {name: group for name, group in main.parallel._stamp.items() if name not in context.parallel._stamp}
    context.parallel.override_permanently(**groups)
    with use_context(context):
        return context, TpModelWorker(server_args=args, gpu_id=get_device().gpu_id, nccl_port=scheduler.nccl_port)
