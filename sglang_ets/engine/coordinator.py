"""The wiring: turns the actions of a search into sglang requests, locks and PRM batches, and their ends into events.

One coordinator lives in each scheduler process; the hooks of `patches/scheduler.py` call it, always on the scheduler's
thread. Only selection and the making of the answer run on a worker thread, on data that nobody changes meanwhile.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from http import HTTPStatus
from importlib.metadata import version
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.disaggregation.utils import prepare_abort
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH

from sglang_ets.core.answer import RankedAnswer
from sglang_ets.core.capacity import Need, NeedEstimates, SearchQueue
from sglang_ets.core.clusters import Distances, cosine_distances
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.kv_pressure import under_pressure
from sglang_ets.core.search import Action, Complete, Expand, Finish, Measure, Prune, Score, Search, Select
from sglang_ets.core.selection import Selection, SelectionPolicy
from sglang_ets.core.tree import StepFinish
from sglang_ets.engine.admission import PLACE, asks_for_search, carried_config, prompt_text, refusal
from sglang_ets.engine.children import (
    ChildReq,
    ChildSpec,
    SearchIds,
    children_in_engine,
    counts_outputs,
    make_child,
    step_end,
)
from sglang_ets.engine.decisions import Decision, Decisions, Failed
from sglang_ets.engine.figures import default_settings, finished_line, lost_level, result_of, state_of
from sglang_ets.engine.forks import Forks, can_fork
from sglang_ets.engine.guesses import Ended
from sglang_ets.engine.live import ROOT, Branch, ForkMode, LiveSearch
from sglang_ets.engine.locks import SearchLocks
from sglang_ets.engine.metrics import make_metrics
from sglang_ets.engine.pressure import GiveUp, PressureValve, Release, Suspend
from sglang_ets.engine.progress import answerable, progress_report, shared_text
from sglang_ets.engine.scoring import StepScoring
from sglang_ets.engine.speculation import Speculation
from sglang_ets.engine.step_queue import StepQueue, rows_for_children
from sglang_ets.engine.step_text import StepText, read_step
from sglang_ets.engine.strands import DRAW_KEY, Draw, Strands, can_share, tokens_computed
from sglang_ets.engine.token_states import token_states
from sglang_ets.engine.tree_plan import make_planner
from sglang_ets.engine.voting import Voting
from sglang_ets.kv import Hold, RadixLedger
from sglang_ets.prm.ranks import ONE_RANK, Ranks
from sglang_ets.prm.steps import Outcome, PrmError, StepScorer
from sglang_ets.wire import ABORTED_STATUS, RESULT_KEY

logger = logging.getLogger(__name__)

STOPPING = "the server is stopping; send the search again when it is back, or to another one"
LIMITS = {
    "kv_budget": "kv_budget_tokens",
    "max_total_tokens": "max_total_tokens",
}  # by how a search ends that reached it
ABORTED = "the search was aborted: its client went away, or /abort_request named it"


class SearchCoordinator:
    """All searches of one scheduler. `searches` is empty when, and only when, the engine is stock sglang."""

    def __init__(
        self,
        scheduler: Any,
        prm: StepScorer,
        ranks: Ranks = ONE_RANK,
        *,
        distances: Distances = cosine_distances,
        policy_of: Callable[[SearchConfig], SelectionPolicy] = attrgetter("policy"),
    ) -> None:
        self.scheduler = scheduler
        self.prm = prm
        self.searches: dict[str, LiveSearch] = {}  # oldest first
        self._distances = distances
        self._policy_of = policy_of
        self._settings = scheduler.server_args._ets
        self._defaults = default_settings(self._settings)
        self._num_done = 0
        self._num_failed = 0
        self._is_stopping = False
        self._metrics = make_metrics(scheduler)
        self._scoring = StepScoring(prm, self._metrics)
        self._valve = PressureValve(scheduler)
        self._estimates = NeedEstimates()
        self._decisions = Decisions(ranks)
        self._ids = SearchIds(ranks)
        self._voting = Voting()

    @cached_property
    def ledger(self) -> RadixLedger:
        """The policy model's ledger; made at first use because the radix cache is built after the coordinator."""
        return RadixLedger(self.scheduler.tree_cache, self.scheduler.token_to_kv_pool_allocator)

    @cached_property
    def _locks(self) -> SearchLocks:
        return SearchLocks(self.ledger, self.prm)

    @cached_property
    def _queue(self) -> SearchQueue:
        """Who runs and who waits; made at first use, when the pools have their sizes."""
        pools = Need(self.scheduler.max_total_num_tokens, self.prm.pool_tokens)
        return SearchQueue(pools, self._settings["max_waiting"], self._settings["max_running"])

    @cached_property
    def _steps(self) -> StepQueue:
        rows = rows_for_children(self.scheduler.max_running_requests, self._settings["max_running_steps"])
        return StepQueue(self.scheduler, rows, self._forks)

    @cached_property
    def _forks(self) -> Forks:
        return Forks(self.scheduler)

    @cached_property
    def _strands(self) -> Strands:
        return Strands(self.scheduler, self.ledger)

    @cached_property
    def _speculation(self) -> Speculation:
        return Speculation(self.scheduler, self.ledger, self._steps, self._forks)

    @cached_property
    def _fork_mode(self) -> ForkMode:
        """How steps of searches start on this server."""
        asked: ForkMode = self._settings["forks"]
        if asked == "extend" or not can_fork(self.scheduler):
            return "extend"
        return "shared" if asked == "shared" and can_share(self.scheduler) else "decode"

    @cached_property
    def plan_attention(self) -> Callable[[Any], None] | None:
        """What is told the batch of each tick if the attention reads shared KV once; None with other backends."""
        return make_planner(self.scheduler)

    # ---- admission ----

    def admit(self, req: Any, is_retracted: bool) -> bool:
        """Take over a request that asks for a search. Returns False for every other request."""
        if not asks_for_search(req) or is_retracted or req.to_finish is not None or req.finished():
            return False
        if not self.scheduler._set_or_validate_priority(req):
            self.scheduler._release_aborted_request(req)
            return True
        try:
            config = carried_config(req, self._settings)
        except Exception as error:  # custom_params can come straight from a client: the same boundary as `guard`
            message = str(error) if isinstance(error, ValueError) else f"{PLACE} could not be read: {error!r}"
            prepare_abort(req, message, status_code=HTTPStatus.BAD_REQUEST)
            self.scheduler.output_streamer.stream_output([req], False)
            return True
        spec = ChildSpec(self._ids.new(), req, config.seed, config.step_delimiter, self.prm.reads_states)
        live = LiveSearch(spec, Search(config, len(req.origin_input_ids), self._distances))
        live.forks = "extend" if counts_outputs(req.sampling_params) else self._fork_mode
        with self.guard(live):
            self._begin(live)
        return True

    def _begin(self, live: LiveSearch) -> None:
        config, req = live.search.config, live.req
        if self._is_stopping:
            self._answer_error(live, STOPPING, HTTPStatus.SERVICE_UNAVAILABLE)
            return
        refused = refusal(config, req, self.scheduler.max_total_num_tokens) or self.prm.refusal(
            req.origin_input_ids, prompt_text(req), config.max_tokens
        )
        if refused:
            self._answer_error(live, refused, HTTPStatus.BAD_REQUEST)
            return
        need = self._estimates.estimate(live.search.config, live.prompt_need)
        if not self._queue.enter(live.id, need, live.req.priority or 0):
            self._answer_error(live, self._full(), HTTPStatus.TOO_MANY_REQUESTS)
            return
        live.req.time_stats.set_wait_queue_entry_time()
        self.searches[live.id] = live
        self._metrics.sync(len(self.searches), self.ledger)
        # One request brings the prompt into the cache; otherwise every child of the first level would compute it.
        self._queue_child(live, [ROOT], (), 0)

    def _full(self) -> str:
        return (
            f"{self._queue.num_waiting} searches wait already, the most that this server lets wait; "
            "try again later, or raise --search-max-waiting"
        )

    def refuse(self, recv_req: Any, error: Exception) -> None:
        """Answer a request, ordinary or not, that sglang could not even read; nothing of it is in the engine."""
        logger.error("request %s could not be read", recv_req.rid, exc_info=error)
        reason = {
            "type": "abort",
            "message": f"the request could not be read ({type(error).__name__}: {error}); check the types of its fields",
            "status_code": HTTPStatus.BAD_REQUEST.value,
        }
        self.scheduler.send_abort_output(AbortReq(rid=recv_req.rid, finished_reason=reason), recv_req)

    # ---- events from the engine ----

    def after_batch(self, batch: Any, result: Any = None) -> None:
        """Children of this batch that finished become events; complete levels are scored and selected."""
        draw = getattr(result, DRAW_KEY, None)
        states = token_states(batch, result) if self.prm.reads_states and self.searches else None
        done: list[tuple[LiveSearch, Ended]] = []
        for row, req in enumerate(batch.reqs):
            if not isinstance(req, ChildReq):
                continue
            if req.finished():
                self._steps.left(req.rid)
            live = self._search_of(req)
            if live is not None:
                self._count(live, req, tokens_computed(batch, row))
                with self.guard(live):
                    state = None if states is None else states[row]
                    done += [(live, ended) for ended in self._after_token(live, req, draw, state)]
        # All are held before the first of them may end its search, which frees what nobody holds.
        for live, ended in done:
            with self.guard(live):
                self._child_done(live, ended)
        self._score_due()
        self._forget_drained()

    def before_batch(self, running_batch: Any) -> Any:
        """Once per tick: take in finished selections and answers, and end searches whose time is up.

        Returns the running batch with the children that start in it.
        """
        searches = list(self.searches.values())
        if self.scheduler.running_batch.is_empty() and not self.scheduler.waiting_queue:
            self._decisions.wait_for_one(searches)
        for live, decision in self._decisions.due(searches):
            with self.guard(live):
                self._take_in(live, decision)
        self._score_due()
        self._forget_drained()
        return self._feed(running_batch)

    def _feed(self, running_batch: Any) -> Any:
        """Let searches start, or go on, as the pools allow, and their steps enter the engine behind ordinary requests."""
        self._queue.start()
        self._guess()
        entered = self._steps.feed(self._queue.running)
        for child in (*entered.forks, *entered.queued):
            child.time_stats.set_wait_queue_entry_time()
            child.arrival_processed_tokens = self.scheduler.processed_tokens_counter
        if entered.forks:
            running_batch = self._forks.join(entered.forks, running_batch)
        for child in (*entered.forks, *entered.queued):
            self._locks.start_from(self.searches[child.spec.search_id], child.rid)
            child.source = None  # from here on it may have more tokens than that path
        return running_batch

    def _guess(self) -> None:
        """Searches that wait for the longest steps of a level go on with what selection would probably keep of it."""
        running = [self.searches[search_id] for search_id in self._queue.running]
        running = [live for live in running if live.search.speculates and not live.has_ended]
        if not running or self._queue.num_waiting or self._queue.num_suspended:
            return
        for live in running:
            if live.guesses.is_stale and not live.guesses.has_failed and live.awaited is None:
                self._forecast(live)
        self._speculation.start(running)

    def _forecast(self, live: LiveSearch) -> None:
        live.guesses.is_stale = False
        policy = self._policy_of(live.search.config)
        try:
            choose = live.forecast(policy)
            if choose is None:
                return
            if self._decisions.in_loop(getattr(policy, "is_cheap", False)):
                live.guesses.expected = choose()
            else:
                self._decisions.guess(live, choose)
        except Exception as error:  # guesses save time and decide nothing: the search can do without
            logger.exception("search %s goes on without guesses", live.rid)
            _no_guesses(live, f"{type(error).__name__}: {error}")

    def after_plan(self, plan: Any) -> None:
        """Break a standstill as the pressure valve decides."""
        order = [self.searches[search_id] for search_id in self._queue.running]
        if self.scheduler.waiting_queue:  # after a plan: they have found no room
            for live in order:
                if live.search.speculates:
                    with self.guard(live):
                        self._speculation.give_up(live)
        match self._valve.decide(plan, order, [live for live in self.searches.values() if live not in order]):
            case Release(live, tokens):
                with self.guard(live):
                    self._release(live, tokens)
            case Suspend():
                self._suspend_youngest()
            case GiveUp(live, message):
                with self.guard(live):
                    self.fail(live, message)

    def _suspend_youngest(self) -> None:
        """The youngest running search waits until there is room again; its KV is computed again then."""
        search_id = self._queue.suspend()
        if search_id is not None:
            live = self.searches[search_id]
            with self.guard(live):
                self._steps.withdraw(search_id)
                self._release(live, self.scheduler.max_total_num_tokens)

    def bound_queue(self, is_refused: Callable[[], bool], req: Any) -> bool:
        """Whether --max-queued-requests refuses this request. It counts ordinary ones; a step that was retracted goes on."""
        return not isinstance(req, ChildReq) and self._steps.without_children(is_refused)

    def swallow_abort(self, req: Any) -> bool:
        """A child that left the waiting queue is an event for its search, not an answer for a client."""
        if not isinstance(req, ChildReq):
            return False
        self._steps.left(req.rid)
        live = self._search_of(req)
        if live is not None:
            if live.left(req.rid):
                self._speculation.ended(live, [Ended(req, [])])
                return True
            # A step that is aborted for want of memory has been taken out of the batch, and carries the reason.
            reason = "aborted while it waited" if req.to_finish is None else req.to_finish.message
            with self.guard(live):
                self._members_failed(live, req, reason)
        return True

    def before_abort(self, recv_req: AbortReq) -> None:
        """The client went away or gave up: answer its search with the abort and end the children.

        An abort ends every request whose id begins with its own, as sglang has it.
        """
        for live in list(self.searches.values()):
            if not live.is_answered and (recv_req.abort_all or live.rid.startswith(recv_req.rid)):
                self._abort(live, recv_req.abort_message or ABORTED, ABORTED_STATUS)

    def stop(self) -> None:
        """The server has been asked to stop: it does not wait for searches, and begins none."""
        self._is_stopping = True
        for live in list(self.searches.values()):
            if not live.is_answered:
                self._abort(live, STOPPING, HTTPStatus.SERVICE_UNAVAILABLE)

    def _abort(self, live: LiveSearch, message: str, status: int) -> None:
        with self.guard(live):
            live.end_reason = "aborted"
            self._answer_error(live, message, status)
            self._close(live)

    def after_flush(self) -> None:
        """sglang has emptied its cache, which it does while nothing runs: after a change of weights, for one."""
        self.prm.forget()

    def after_abort(self, recv_req: AbortReq) -> None:
        """A search whose last child was aborted is forgotten at once, unless it aborts them itself: then it may be amid a
        round of steps or scores, whose locks are still to be given back."""
        if recv_req.rid not in self.searches:
            self._forget_drained()

    def _search_of(self, child: ChildReq) -> LiveSearch | None:
        """The search that waits for this child. With the overlap schedule a finished child is shown twice."""
        live = self.searches.get(child.spec.search_id)
        return live if live is not None and live.waits_for(child.rid) else None

    def _count(self, live: LiveSearch, child: ChildReq, num_tokens: int) -> None:
        if child.members and child.node_id == ROOT:
            return
        child.num_computed += num_tokens
        live.tokens_computed += num_tokens
        if not child.members:
            live.guesses.tokens_wasted += num_tokens

    def _after_token(
        self, live: LiveSearch, child: ChildReq, draw: Draw | None, state: NDArray[np.float32] | None
    ) -> list[Ended]:
        """A child may have got a token, sampled from `state`: its strand parts.

        Returns the steps that have ended with it, each held.
        """
        has_token, child.num_seen = len(child.output_ids) > child.num_seen, len(child.output_ids)
        if has_token and state is not None:
            child.add_state(state)
        is_failed = child.finished() and step_end(child).kind == "failed"
        is_guess = child.rid in live.guesses.children
        if child.finished():
            live.left(child.rid)
        elif live.has_ended and child.to_finish is None:
            # sglang's abort does not look into the batch that was launched last, if it brings prompts into the cache.
            child.to_finish = FINISH_ABORT()
        if live.has_ended or not child.members:
            return []
        children: list[ChildReq] = []
        if has_token and draw is not None and not is_failed and len(child.members) > 1:
            children = self._part(live, child, draw, is_guess)
        if child.finished():
            children.append(child)
        ended = [Ended(one, self._held(live, one)) for one in children]
        for one in children:
            self._locks.start_from(live, one.rid)
        if not is_guess:
            return ended
        self._speculation.ended(live, ended)
        return []

    def _held(self, live: LiveSearch, child: ChildReq) -> list[Hold]:
        """Locks on what a child that has ended left, one for each of its nodes; none if it failed."""
        num_holds = 0 if step_end(child).kind == "failed" else len(child.members)
        return [self.ledger.hold(live.id, child.last_node) for _ in range(num_holds)]

    def _part(self, live: LiveSearch, child: ChildReq, draw: Draw, is_guess: bool) -> list[ChildReq]:
        """Members that drew another token leave the strand. Returns those children whose own token has ended their step."""
        parted = self._strands.part(live.id, child, draw.drawn(child))
        going_on = [one for one in parted if not one.finished()]
        holds = {one.rid: one.source for one in parted if one.source is not None}
        if is_guess:
            live.guesses.parted |= holds
            live.guesses.children |= {one.rid: one for one in going_on}
        else:
            live.parted |= holds
            live.children.update(one.rid for one in going_on)
        self._steps.add_first(live.id, going_on)
        return [one for one in parted if one.finished()]

    def _child_done(self, live: LiveSearch, ended: Ended) -> None:
        child, end = ended.child, step_end(ended.child)
        if end.kind == "failed":
            self._members_failed(live, child, end.reason)
        elif live.has_ended:
            self.ledger.drop(ended.holds, live.prompt_tokens)
        elif child.node_id == ROOT:
            self._prompt_ready(live, ended.holds[0])
        else:
            self._steps_ready(live, child, ended.holds, end.kind, end.stop_text)

    def _prompt_ready(self, live: LiveSearch, hold: Hold) -> None:
        branch = live.branches[ROOT] = Branch(hold)
        branch.prm = self.prm.open_prompt(live.req.origin_input_ids, prompt_text(live.req), live.id)
        live.prm_tokens += len(branch.prm.token_ids)
        self.apply(live, live.search.start())

    def _steps_ready(
        self, live: LiveSearch, child: ChildReq, holds: Sequence[Hold], finish: StepFinish, stop_text: str | None
    ) -> None:
        """All nodes of a child have the same step, and the same text before it."""
        step_ids, first = child.step_ids, child.node_id
        for node_id, hold in zip(child.node_ids, holds, strict=True):
            live.branches[node_id] = Branch(hold, states=child.states)
        step = _step_text(live, first, step_ids, is_last=live.search.is_last_step(first, len(step_ids), finish))
        text = step.text.split(stop_text, 1)[0] if stop_text else step.text
        actions: list[Action] = []
        for node_id in child.node_ids:
            live.branches[node_id].num_pending_tokens = step.num_pending_tokens
            self._locks.child_ended(live, live.parent_id(node_id))
            actions += live.search.on_step(node_id, step_ids, text, finish)
        self.apply(live, actions)

    def _members_failed(self, live: LiveSearch, child: ChildReq, reason: str) -> None:
        for node_id in child.node_ids:
            self._child_failed(live, node_id, reason)

    def _child_failed(self, live: LiveSearch, node_id: int, reason: str) -> None:
        if live.has_ended:
            return
        if node_id == ROOT:
            self.fail(live, f"the prompt could not be computed: {reason}")
            return
        self._locks.child_ended(live, live.parent_id(node_id))
        self._locks.child_scored(live, live.parent_id(node_id))
        self.apply(live, live.search.on_failed(node_id, reason))

    # ---- scores ----

    def _score_due(self) -> None:
        for live, node_id, outcome in self._scoring.outcomes():
            with self.guard(live):
                self._scored(live, node_id, outcome)

    def _scored(self, live: LiveSearch, node_id: int, outcome: Outcome) -> None:
        if isinstance(outcome, PrmError):
            if not live.has_ended:
                self._unscored(live, node_id, str(outcome))
            return
        score, path = outcome
        if live.has_ended:
            self.prm.drop([path])
            return
        live.branches[node_id].prm, live.branches[node_id].states = path, None
        parent_id = live.parent_id(node_id)
        before = live.branches[parent_id].prm
        assert before is not None, "a parent keeps its PRM path until its last child is scored"
        live.prm_tokens += len(path.token_ids) - len(before.token_ids)
        self._locks.child_scored(live, parent_id)
        live.guesses.is_stale = live.guesses.is_due = True
        self.apply(live, live.search.on_scored(node_id, score.score, score.embedding))

    def _unscored(self, live: LiveSearch, node_id: int, reason: str) -> None:
        """A step without a score ends its trajectory; one that has been continued already ends the search."""
        if not live.branches[node_id].is_tip:
            self.fail(live, reason)
            return
        self._locks.child_scored(live, live.parent_id(node_id))
        self._locks.drop(live, [node_id])
        self.apply(live, live.search.on_failed(node_id, reason))

    # ---- actions of a search ----

    def apply(self, live: LiveSearch, actions: Sequence[Action]) -> None:
        """Carry out what the search wants, until one of its actions ends it; steps that begin together, together."""
        if not live.is_answered:
            self._expand(live, [action for action in actions if isinstance(action, Expand)])
        for action in actions:
            if live.is_answered:
                return
            match action:
                case Score():
                    self._scoring.add(live, action.node_id)
                case Measure():
                    self._level_done(live, action.level)
                case Select():
                    self._select(live, action)
                case Prune():
                    self._locks.drop(live, action.node_ids)
                case Complete():
                    self._locks.drop(live, [action.node_id])
                case Finish():
                    self._finish(live, action.reason)

    def _expand(self, live: LiveSearch, actions: Sequence[Expand]) -> None:
        """Begin the steps of new nodes, but for those that have begun as guesses."""
        nodes, rooms = live.search.tree.nodes, dict[int, int]()
        for action in actions:
            branch = live.branches[action.parent_id]
            branch.is_tip = False
            branch.num_open_children += len(action.node_ids)
            branch.num_unscored_children += len(action.node_ids)
            for node_id in action.node_ids:
                if not live.guesses.claim((action.parent_id, nodes[node_id].index), node_id):
                    rooms[node_id] = action.max_new_tokens
        self._begin_steps(live, rooms)

    def _begin_steps(self, live: LiveSearch, rooms: Mapping[int, int]) -> None:
        """Queue a child for each of these nodes, or for all that continue the same tokens, with the room of its step."""
        tree = live.search.tree
        parents = dict.fromkeys(live.parent_id(node_id) for node_id in rooms)
        given = {parent_id: tree.trajectory_token_ids(tree.nodes[parent_id]) for parent_id in parents}
        begun: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
        for node_id in rooms:
            # Equal tokens in more steps are nearer to the most that a trajectory may have.
            row = given[live.parent_id(node_id)], tree.nodes[node_id].depth, 0 if live.forks == "shared" else node_id
            begun.setdefault(row, []).append(node_id)
        for (token_ids, *_), node_ids in begun.items():
            self._queue_child(live, node_ids, token_ids, rooms[node_ids[0]])

    def _queue_child(
        self, live: LiveSearch, node_ids: Sequence[int], token_ids: Sequence[int], max_new_tokens: int
    ) -> None:
        tree, source = live.search.tree, None
        members = [live.spec.member(node_id, tree.place(tree.nodes[node_id])) for node_id in node_ids]
        if node_ids[0] != ROOT and live.forks != "extend":
            source = live.branches[live.parent_id(node_ids[0])].hold
        child = make_child(live.spec, members, token_ids, max_new_tokens, source)
        live.children.add(child.rid)
        self._steps.add(live.id, child)

    def _level_done(self, live: LiveSearch, level: int) -> None:
        live.loop_ms.append(0.0)
        with live.on_loop():
            live.sample_kv(self.ledger, level)
        self._queue.update(live.id, live.need)
        self._metrics.level_done(live)
        self._metrics.sync(len(self.searches), self.ledger)
        lost = lost_level(live, level)
        if lost is not None:
            self.fail(live, lost)

    def _select(self, live: LiveSearch, action: Select) -> None:
        live.select_started_s = time.perf_counter()
        config = self._pressed(live)
        with live.on_loop():
            policy = self._policy_of(config)
            choose = partial(live.decide, policy, action.leaf_ids, config)
            selection = choose() if self._decisions.in_loop(getattr(policy, "is_cheap", False)) else None
            if selection is None:
                self._decisions.select(live, choose)
        live.select_blocked_ms.append(live.loop_ms[-1])
        if selection is not None:
            self._selected(live, selection)

    def _pressed(self, live: LiveSearch) -> SearchConfig:
        """The settings by which the present level is decided: with --search-kv-pressure, a full pool makes KV dearer."""
        config, strength = live.search.config, self._settings["kv_pressure"]
        if not strength or not config.is_solved:
            return config
        pressed = under_pressure(config, self.ledger.held_tokens() / self.scheduler.max_total_num_tokens, strength)
        if pressed is not config:
            live.kv_cost_weight_max = max(live.kv_cost_weight_max or 0.0, pressed.weights.kv_cost_weight)
        return pressed

    def _selected(self, live: LiveSearch, selection: Selection) -> None:
        with live.on_loop():
            if selection.solver is not None:
                live.solver_reports.append(selection.solver)
            live.num_fallbacks += selection.is_fallback
            self._metrics.selected(live, selection, time.perf_counter() - live.select_started_s)
            self.apply(live, live.search.on_selected(selection))
            live.sample_retained()
            if not live.has_ended:
                self._report(live)
                self._use_guesses(live)

    def _use_guesses(self, live: LiveSearch) -> None:
        """What selection has claimed goes on, or has ended. After the report, which looks for leaves without a next step."""
        own, anew = self._speculation.decide(live)
        self._begin_steps(live, anew)
        for ended in own:
            with self.guard(live):
                self._child_done(live, ended)

    def _report(self, live: LiveSearch) -> None:
        """After a selection: fix the final text and, if the client streams, send it with the figures of the level.

        A search that is traced is a stream for the API server whatever its client asked for.
        """
        live.final_text = shared_text(live.search)
        if live.req.stream:
            live.req.customized_info = {RESULT_KEY: [progress_report(live, self.ledger.held_tokens(live.id))]}
            self.scheduler.output_streamer.stream_output([live.req], False)

    def _take_in(self, live: LiveSearch, decision: Decision) -> None:
        if decision.kind == "deadline":
            self._time_is_up(live)
            return
        live.awaited = None
        if isinstance(decision.value, Failed):
            without = _no_guesses if decision.kind == "guess" else self.fail
            without(live, decision.value.message)
        elif decision.kind == "select":
            self._selected(live, decision.value)
        elif decision.kind == "guess":
            live.guesses.expected, live.guesses.is_due = decision.value, True
        else:
            self._answer(live, decision.value)

    # ---- time and memory run out ----

    def _time_is_up(self, live: LiveSearch) -> None:
        if live.has_ended:
            return
        if not live.search.trajectories():
            self._keep_unfinished_steps(live)
        self.apply(live, live.search.stop("deadline"))

    def _keep_unfinished_steps(self, live: LiveSearch) -> None:
        """No step was finished in time: what the children have generated so far is all that there is to answer with."""
        inside = children_in_engine(self.scheduler, live.children)
        begun = {node_id: child for child in (*self._steps.pending(live.id), *inside) for node_id in child.node_ids}
        for node_id, child in sorted(begun.items()):
            step_ids = child.step_ids
            if node_id != ROOT and step_ids:
                step = _step_text(live, node_id, step_ids, is_last=True)
                live.search.on_step(node_id, step_ids, step.text, "length")  # no action: the search stops now

    def _release(self, live: LiveSearch, tokens: int) -> None:
        """Give up locks on the policy model's KV, which is computed again when it is needed, until `tokens` can be evicted."""
        before = self.scheduler.tree_cache.evictable_size()
        self._speculation.give_up(live)
        for hold in live.holds_by_promise():
            freed = self.scheduler.tree_cache.evictable_size() - before
            if freed >= tokens:
                break
            self.ledger.release(hold)
        live.num_pressure_releases += 1
        freed = self.scheduler.tree_cache.evictable_size() - before
        logger.info("KV pool under pressure: search %s unlocked %d tokens, to be computed again", live.rid, freed)

    # ---- ends ----

    def _finish(self, live: LiveSearch, reason: str) -> None:
        live.end_reason = reason
        trajectories = answerable(live)
        self._decisions.answer(live, lambda: self._voting.submit(trajectories, live.search.config, live.notes.append))
        self._abort_children(live)

    def _answer(self, live: LiveSearch, answers: list[RankedAnswer]) -> None:
        if not answers:
            self._end_without_text(live)
            return
        req = live.req
        live.num_prm_releases = self.prm.num_releases(live.id)
        result = result_of(live, answers)
        req.output_ids = array("q", answers[0].token_ids)
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
        req.customized_info = {RESULT_KEY: [result]}
        self._send(live)
        self._num_done += 1
        self._estimates.observe(live.search.config, live.prompt_need, live.need)
        logger.info("%s", finished_line(result))
        for warning in result["search"]["warnings"]:
            logger.warning("search %s: %s", live.rid, warning)
        self._close(live)

    def _end_without_text(self, live: LiveSearch) -> None:
        """Too little time is no fault: a client can tell the two by the status."""
        if live.end_reason != "deadline":
            remedy = f"; raise {setting}" if (setting := LIMITS.get(live.end_reason)) else ""
            self.fail(live, f"no trajectory was completed ({live.end_reason}){remedy}")
            return
        passed = f"deadline_s of {live.search.config.deadline_s:g} passed"
        message = f"{passed} before the search had any text; raise it, or send fewer requests at once"
        self._answer_error(live, message, HTTPStatus.GATEWAY_TIMEOUT)
        self._close(live)

    def fail(self, live: LiveSearch, message: str) -> None:
        """End a search with an error, unless it has its answer already; nothing of it stays behind."""
        if not live.is_answered:
            live.end_reason = live.end_reason or "failed"
            self._answer_error(live, f"search failed: {message}", HTTPStatus.INTERNAL_SERVER_ERROR)
        self._close(live)

    def _answer_error(self, live: LiveSearch, message: str, status: int) -> None:
        self._num_failed += 1
        logger.warning("search %s ended without an answer: %s", live.rid, message)
        live.req.finished_reason = FINISH_ABORT(message, status)
        self._send(live)

    def _send(self, live: LiveSearch) -> None:
        live.is_answered = True
        self._metrics.ended(live, time.monotonic() - live.started_s)
        self._metrics.sync(len(self.searches), self.ledger)
        live.req.time_stats.set_completion_time()
        self.scheduler.output_streamer.stream_output([live.req], False)

    def _close(self, live: LiveSearch) -> None:
        """An answered search holds nothing and waits for nothing."""
        self._decisions.forget(live)
        self._locks.drop_all(live)
        self._abort_children(live)
        self._queue.leave(live.id)

    def _abort_children(self, live: LiveSearch) -> None:
        self._speculation.give_up(live)
        for child in self._steps.discard(live.id):
            live.left(child.rid)  # a guess too, that was given up in the engine and taken back from there
        self._locks.drop_parted(live)
        if live.children:
            self.scheduler.abort_request(AbortReq(rid=live.id))

    @contextmanager
    def guard(self, live: LiveSearch) -> Iterator[None]:
        """A bug in one search must not end the server: whatever escapes fails this search and is logged."""
        try:
            yield
        except Exception as error:  # the one boundary between a search and the scheduler loop
            logger.exception("search %s failed", live.rid)
            self.fail(live, f"{type(error).__name__}: {error}")

    def _forget_drained(self) -> None:
        for search_id in [search_id for search_id, live in self.searches.items() if live.is_over]:
            live = self.searches.pop(search_id)
            with self.guard(live):
                self.ledger.end_owner(live.id)
                self.prm.end_owner(live.id)
            self._metrics.sync(len(self.searches), self.ledger)

    def describe(self) -> dict[str, Any]:
        """For `/server_info`: what this server is and what its searches hold right now."""
        return {
            "version": version("sglang-ets"),
            "defaults": self._defaults,
            "searches": [state_of(live, self.ledger.held_tokens(live.id)) for live in self.searches.values()],
            "live": len(self.searches),
            "running": len(self._queue.running),
            "suspended": self._queue.num_suspended,
            "waiting": self._queue.num_waiting,
            "steps_in_engine": self._steps.num_inside,
            "done": self._num_done,
            "failed": self._num_failed,
            "held_kv_tokens": self.ledger.held_tokens(),
            "locks": self.ledger.num_holds,
            "kv_freed_at_once_tokens": self.ledger.freed_tokens,
            "prm": self.prm.stats(),
        }


def _no_guesses(live: LiveSearch, message: str) -> None:
    """The policy cannot be asked before a level is complete."""
    live.guesses.has_failed = True
    live.notes.append(
        f"no step begins before its level's selection any more: asking for a part of a level failed ({message})"
    )


def _step_text(live: LiveSearch, node_id: int, step_ids: tuple[int, ...], *, is_last: bool) -> StepText:
    """What a step that is not in the tree yet adds to its trajectory's text."""
    tree, parent_id = live.search.tree, live.parent_id(node_id)
    parent = tree.nodes[parent_id]
    return read_step(
        live.req.tokenizer,
        tree.trajectory_token_ids(parent) + step_ids,
        live.branches[parent_id].num_pending_tokens + len(step_ids),
        tree.trajectory_text(parent),
        is_last=is_last,
    )
