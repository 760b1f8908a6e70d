"""The PRM as a second model in the scheduler process: own runtime context, own KV pool, own radix cache.

A step is scored once, and only its tokens are extended, beside one token of what came before (whose hidden state the first
token of the step needs). Every call runs on the scheduler's thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.runtime_context import get_context, get_parallel, use_context
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_ets.kv import Hold
from sglang_ets.prm.choose import AUTO, choose_format
from sglang_ets.prm.formats import PrmFormat, StepProbability, StepTokens
from sglang_ets.prm.pool import MAX_BATCH_TOKENS, Extended, PoolImbalance, PrmPool, TokenRun
from sglang_ets.prm.ranks import current_ranks
from sglang_ets.prm.readout import StepStates, read_steps
from sglang_ets.prm.sizing import GB, PoolNeed, check_pool_tokens, default_pool_tokens
from sglang_ets.prm.split import num_prm_ranks
from sglang_ets.prm.steps import Outcome, PrmError, PrmPath, ScoreJob, StepScore
from sglang_ets.prm.stream import ForwardStream
from sglang_ets.prm.valve import PathValve
from sglang_ets.prm.worker import pool_budget, start_worker, token_bytes

logger = logging.getLogger(__name__)

OWNER = "prm"  # of paths whose search is not named
WARM_UP_TEXT = "1 + 1 = 2\n"


@dataclass(frozen=True)
class PrmSettings:
    """What the flags say about the PRM."""

    model_path: str
    need: PoolNeed
    format: str = AUTO
    max_total_tokens: int | None = None  # size of its KV pool; None: from `need` and the free memory
    num_ranks: int | None = None  # over which it is split; None: all, or 1 where it does not divide


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

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for steps that have the same score and embedding."""
        return self.job.parent.token_ids, self.tokens, self.job.parent_score

    @property
    def run(self) -> TokenRun:
        parent = self.job.parent
        return TokenRun(self.token_ids, len(parent.token_ids) - 1, parent.owner)


class PrmEngine:
    """Scores steps. Owns the PRM's weights, KV pool and radix cache."""

    reads_states = False
    _pool: PrmPool
    _valve: PathValve

    def __init__(
        self,
        context: Any,
        worker: TpModelWorker,
        settings: PrmSettings,
        spec: PrmFormat,
        tokenizer: Any,
        has_policy_tokens: bool,
        has_policy_weights: bool,
        stream: ForwardStream,
    ) -> None:
        self._context = context
        self._stream = stream
        self._worker = worker
        self._settings = settings
        self._spec = spec
        self._tokenizer = tokenizer
        self._has_policy_tokens = has_policy_tokens  # the PRM reads the policy model's own token ids
        self._has_policy_weights = has_policy_weights
        self._ranks = current_ranks()
        self._split_group: Any = None  # of the ranks over which the PRM is split
        # Over the life of the server: what scoring every trajectory from its start would have cost.
        self.tokens_if_rescored = 0

    @classmethod
    def load(cls, scheduler: Any, settings: PrmSettings) -> PrmEngine:
        """Load the weights, before the policy model's KV pool is sized.

        A PRM at the model path shares the policy model's weights.

        Raises:
            SystemExit: the format is unknown, or does not work on this server, or the pool's size is wrong.
        """
        check_pool_tokens(settings.max_total_tokens)
        policy = scheduler.server_args
        tokenizer = get_tokenizer(settings.model_path, trust_remote_code=policy.trust_remote_code)
        spec = choose_format(settings.model_path, settings.format, tokenizer)
        is_shared = settings.model_path == policy.model_path
        num_ranks = num_prm_ranks(settings.model_path, policy.model_path, get_parallel().tp_size, settings.num_ranks)
        context, worker = start_worker(scheduler, settings.model_path, settings.max_total_tokens, num_ranks)
        if is_shared:
            worker.model_runner.model = scheduler.tp_worker.model_runner.model
        is_same = is_shared or tokenizer.get_vocab() == scheduler.tokenizer.get_vocab()
        has_policy_tokens = spec.reads_policy_tokens and is_same
        return cls(context, worker, settings, spec, tokenizer, has_policy_tokens, is_shared, ForwardStream(scheduler))

    def init_memory_pools(self) -> None:
        """Allocate the PRM's KV pool and make its radix cache.

        Raises:
            SystemExit: no flag gives the pool's size, and not even one trajectory fits into its share of the memory.
        """
        with use_context(self._context):
            per_token = token_bytes(self._worker)
            if self._settings.max_total_tokens is None:
                tokens = default_pool_tokens(self._settings.need, self.context_tokens, per_token, pool_budget())
                get_context().override("the PRM's KV pool", max_total_tokens=tokens)
            self._worker.alloc_memory_pool()
            self._worker.init_attention_backends()
            self._worker.init_cuda_graphs()
            self._pool = PrmPool(self._worker)
            if get_parallel().tp_size > 1:
                self._split_group = get_parallel().tp_group
        self._check_equal_pools()
        self._valve = PathValve(self._pool.ledger)
        self._warm_up()
        need = self._settings.need
        logger.info(
            "PRM ready: format %s, context of %d tokens, KV pool of %d tokens (%.2f GB); a search of width %d with "
            "trajectories of %d tokens that share nothing needs %d (--prm-max-total-tokens sets the size)",
            self._spec.name, self.context_tokens, self._pool.size, self._pool.size * per_token / GB, need.width,
            need.longest(self.context_tokens), need.tokens(self.context_tokens),
        )  # fmt: skip

    def _warm_up(self) -> None:
        """Score a step for nobody: what is compiled at its first use is compiled now, and not amid the first search."""
        ids = self._tokenizer.encode(WARM_UP_TEXT)
        if self.refusal(ids, WARM_UP_TEXT, 2 * len(ids)) is not None:
            return  # a pool or context that takes no search either, which the search will be told
        path = self.open_prompt(ids, WARM_UP_TEXT)
        self.score([ScoreJob(path, None, tuple(ids), WARM_UP_TEXT, depth=1)])
        self.forget()
        self._valve.end(OWNER)
        self._pool.tokens_extended = self.tokens_if_rescored = 0

    def _check_equal_pools(self) -> None:
        size = self._ranks.from_first(self._pool.size)
        if size != self._pool.size:
            raise SystemExit(
                f"the PRM's KV pool holds {self._pool.size} tokens on this rank and {size} on the first, which must be equal; "
                "lower --prm-max-total-tokens"
            )

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest sequence that the PRM was made for."""
        return int(self._worker.model_config.context_len)

    # ---- what a search asks for ----

    def refusal(self, prompt_ids: Sequence[int], question: str, max_tokens: int) -> str | None:
        """Why the PRM cannot read every trajectory of such a search; one sentence, or None.

        Counted in the PRM's tokens: the prompt as it will be read, the steps as `max_tokens`.
        """
        prompt = len(self._prompt(prompt_ids, question))
        return self._limit_broken(
            prompt + max_tokens, f"one trajectory may have {{}} tokens (prompt {prompt} + max_tokens {max_tokens})"
        )

    def open_prompt(self, prompt_ids: Sequence[int], question: str, owner: str = OWNER) -> PrmPath:
        """Bring the prompt into the PRM's cache, once per search, whose id is `owner`.

        Raises:
            PrmError: the prompt does not fit.
        """
        ids = self._prompt(prompt_ids, question)
        broken = self._limit_broken(len(ids), "the prompt has {} tokens")
        if broken:
            raise PrmError(broken)
        self._valve.begin(owner)
        with self._running():
            return PrmPath(ids, self._bring_in(ids, owner))

    def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        """Score finished steps, in as few forward passes as fit. Outcomes in the order of the jobs.

        Other paths give up their locks where that is what it takes. A step that alone is too long, or whose score is no
        number, comes back as a PrmError; whatever else raises leaves nothing locked.
        """
        readings = [_Reading(job, self._tokens(job)) for job in jobs]
        self.tokens_if_rescored += sum(len(reading.token_ids) for reading in readings)
        places: dict[tuple[Any, ...], list[int]] = {}  # identical steps share the work, each with its own lock
        for place, reading in enumerate(readings):
            places.setdefault(reading.key, []).append(place)
        outcomes: dict[int, Outcome] = {}
        waiting = []
        for same in places.values():
            broken = self._unreadable(readings[same[0]])
            if broken is None:
                waiting.append(same)
            else:
                outcomes |= dict.fromkeys(same, PrmError(broken))
        with self._running(), self._dropped_on_error() as holds:
            while waiting:
                first = [readings[same[0]] for same in waiting]
                extended = self._extend(first, [reading.job.parent.hold for reading in readings] + holds)
                holds += [one.hold for one in extended]
                for one, score in zip(extended, self._read(first, extended), strict=True):
                    same = waiting[one.place]
                    made = self._outcomes([readings[place] for place in same], one.hold, score)
                    holds += [outcome[1].hold for outcome in made if not isinstance(outcome, PrmError)]
                    outcomes |= zip(same, made, strict=True)
                done = {one.place for one in extended}
                waiting = [same for at, same in enumerate(waiting) if at not in done]
        return [outcomes[place] for place in range(len(jobs))]

    def release(self, path: PrmPath) -> None:
        """Unlock; the KV stays cached until it is needed. Idempotent."""
        self._pool.ledger.release(path.hold)

    def drop(self, paths: Sequence[PrmPath]) -> int:
        """Unlock and free at once what only these paths hold. Returns the tokens freed. Idempotent."""
        return self._pool.ledger.drop(path.hold for path in paths)

    def num_releases(self, owner: str) -> int:
        """Locks that a search has had to give up because the pool was too small; known until `end_owner`."""
        return self._valve.num_releases(owner)

    def end_owner(self, owner: str) -> None:
        """Check that a search holds nothing any more, and the whole pool with the last one.

        Raises:
            LedgerImbalance: locks are left; they are released before it is raised.
            PoolImbalance: see `check`.
        """
        self._valve.end(owner)
        self._pool.ledger.end_owner(owner)
        if self._valve.is_idle:
            self.check()

    def check(self) -> None:
        """Compare both sides of the pool's account, as sglang does for the policy model's when it is idle.

        Raises:
            PoolImbalance: they differ; the cache is emptied before it is raised, so that the server stays sound.
        """
        try:
            self._pool.check()
        except PoolImbalance:
            self._pool.reset()
            raise

    def forget(self) -> None:
        """Empty the cache: the weights or the memory behind it may have changed. Called while no search runs."""
        self._pool.reset()

    @property
    def pool_tokens(self) -> int:
        """Tokens that the PRM's KV pool holds."""
        return int(self._pool.size)

    def stats(self) -> dict[str, Any]:
        """For `/server_info`."""
        ledger = self._pool.ledger
        return {
            "format": self._spec.name,
            "shares_policy_weights": self._has_policy_weights,
            "shares_policy_tokens": self._has_policy_tokens,
            "context_tokens": self.context_tokens,
            "ranks": 1 if self._split_group is None else self._split_group.world_size,
            "pool_tokens": self._pool.size,
            "held_kv_tokens": ledger.held_tokens(),
            "locks": ledger.num_holds,
            "locks_given_up": self._valve.total_releases,
            "tokens_extended": self._pool.tokens_extended,
            "tokens_if_rescored": self.tokens_if_rescored,
        }

    # ---- limits ----

    def _limit_broken(self, num_tokens: int, what: str) -> str | None:
        """One sentence with need, limit and remedy if so many tokens in a row cannot be read; else None."""
        subject = what.format(num_tokens) + " for the PRM"
        if num_tokens > self.context_tokens:
            return f"{subject}, whose context is {self.context_tokens}; lower max_tokens or shorten the prompt"
        if num_tokens > self._pool.largest_run:
            return f"{subject}, whose KV pool takes {self._pool.largest_run}; lower max_tokens or raise --prm-max-total-tokens"
        return None

    def _unreadable(self, reading: _Reading) -> str | None:
        """Why this step cannot be scored; None if it can. A step without tokens has the score of what came before it."""
        if not reading.tokens.read and reading.job.parent_score is None:
            return "the first step has no text that the PRM could read"
        return self._limit_broken(len(reading.token_ids), "the trajectory has {} tokens")

    # ---- forward passes ----

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._stream.joined(), use_context(self._context), torch.no_grad():
            yield

    @contextmanager
    def _dropped_on_error(self) -> Iterator[list[Hold]]:
        """A list of holds; if the block raises, nobody else will ever give them up."""
        holds: list[Hold] = []
        with ExitStack() as on_error:
            on_error.callback(lambda: self._pool.ledger.drop(holds))
            yield holds
            on_error.pop_all()

    def _bring_in(self, ids: tuple[int, ...], owner: str) -> Hold:
        """Lock the KV of these tokens, computed in pieces that a batch may have."""
        with self._dropped_on_error() as holds:
            for end in (*range(MAX_BATCH_TOKENS, len(ids), MAX_BATCH_TOKENS), len(ids)):
                run = TokenRun(ids[:end], end, owner)
                holds += [one.hold for one in self._pool.extend([run], self._valve.opener(holds))]
                if len(holds) > 1:
                    self._pool.ledger.release(holds.pop(0))
        return holds[0]

    def _extend(self, readings: Sequence[_Reading], present: Sequence[Hold]) -> list[Extended]:
        """One pass over as many of these steps as fit; `present` are the holds of the whole batch."""
        parent = readings[0].job.parent
        if not parent.hold.locked and len(parent.token_ids) > MAX_BATCH_TOKENS:
            parent.hold = self._bring_in(parent.token_ids, parent.owner)
        return self._pool.extend([reading.run for reading in readings], self._valve.opener(present))

    def _read(self, readings: Sequence[_Reading], extended: Sequence[Extended]) -> list[StepScore]:
        """Scores and embeddings of steps whose hidden states (and those of the token before) were just computed."""
        states = [self._states(readings[one.place], one.hidden) for one in extended]
        scores, embeddings = read_steps(self._spec.readout, self._worker.model_runner.model, states, self._split_group)
        scores = self._ranks.from_first(scores)  # reductions may differ in the last bit per rank
        return [StepScore(score, embedding) for score, embedding in zip(scores, embeddings, strict=True)]

    def _states(self, reading: _Reading, hidden: torch.Tensor) -> StepStates:
        tokens, start = reading.tokens, len(hidden) - len(reading.tokens.read)
        if not tokens.read:  # the last token before the step was computed, and stands for it
            return StepStates(hidden[:0], hidden[-1:], slice(0, 1), (), 0, reading.job.parent_score)
        return StepStates(
            hidden[start - 1 : -1],
            hidden[start:],
            tokens.words,
            tokens.read,
            self._first_scored(tokens.read),
            reading.job.parent_score,
        )

    def _outcomes(self, readings: Sequence[_Reading], hold: Hold, score: StepScore) -> list[Outcome]:
        """Of identical steps, the first of which has got `hold`."""
        ledger = self._pool.ledger
        if not math.isfinite(score.score):
            ledger.drop([hold])
            error = PrmError(
                f"the PRM's score of the step is {score.score}, no finite number; check its checkpoint, dtype and quantization"
            )
            return [error] * len(readings)
        holds = [hold, *(ledger.hold(reading.job.parent.owner, hold.node) for reading in readings[1:])]
        return [(score, PrmPath(reading.kept_ids, own)) for reading, own in zip(readings, holds, strict=True)]

    def _prompt(self, prompt_ids: Sequence[int], question: str) -> tuple[int, ...]:
        return tuple(prompt_ids) if self._has_policy_tokens else self._spec.layout.prompt(question)

    def _tokens(self, job: ScoreJob) -> StepTokens:
        return StepTokens(job.step_ids) if self._has_policy_tokens else self._spec.layout.step(job.step_text, job.depth)

    def _first_scored(self, token_ids: Sequence[int]) -> int:
        readout = self._spec.readout
        if not isinstance(readout, StepProbability) or readout.score_after is None:
            return 0
        return readout.first_scored([self._tokenizer.decode([token]) for token in token_ids])
