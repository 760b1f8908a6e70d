"""The wiring: turns the actions of a search into sglang requests, locks and PRM batches, and their ends into events.

One coordinator lives in each scheduler process; the hooks of `patches/scheduler.py` call it, always on the scheduler's
thread. Only selection and the making of the answer run on a worker thread, on data that nobody changes meanwhile.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.utils import prepare_abort
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH
from sglang.srt.runtime_context import get_parallel

from sglang_ets.core.answer import RankedAnswer
from sglang_ets.core.config import Algorithm
from sglang_ets.core.search import Action, Complete, Expand, Finish, Measure, Prune, Score, Search, Select
from sglang_ets.core.selection import Selection, SelectionPolicy
from sglang_ets.engine.admission import carried_config, prompt_text
from sglang_ets.engine.children import ChildReq, make_child, step_end
from sglang_ets.engine.figures import result_of
from sglang_ets.engine.live import ROOT, Branch, LiveSearch
from sglang_ets.engine.metrics import finished_line, make_metrics, state_of
from sglang_ets.engine.pressure import relieve
from sglang_ets.engine.progress import answerable, report_progress
from sglang_ets.engine.scoring import StepScoring
from sglang_ets.engine.voting import Voting
from sglang_ets.kv import Hold, RadixLedger
from sglang_ets.prm.engine import PrmEngine
from sglang_ets.wire import RESULT_KEY

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.002  # with nothing to decode, the loop sleeps this long at most for a selection


class SearchCoordinator:
    """All searches of one scheduler. `searches` is empty when, and only when, the engine is stock sglang."""

    def __init__(self, scheduler: Any, prm: PrmEngine, policies: Mapping[Algorithm, SelectionPolicy]) -> None:
        self.scheduler = scheduler
        self.prm = prm
        self._policies = policies
        self.searches: dict[str, LiveSearch] = {}
        self.num_done = 0
        self.num_failed = 0
        self.stuck_ticks = 0
        self.metrics = make_metrics(scheduler)
        self._scoring = StepScoring(self)
        self._ledger: RadixLedger | None = None
        self._workers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sglang-ets")
        self._voting = Voting()

    @property
    def ledger(self) -> RadixLedger:
        """The policy model's ledger; made at first use because the radix cache is built after the coordinator."""
        if self._ledger is None:
            self._ledger = RadixLedger(self.scheduler.tree_cache, self.scheduler.token_to_kv_pool_allocator)
        return self._ledger

    # ---- admission ----

    def admit(self, req: Any, is_retracted: bool) -> bool:
        """Take over a request that asks for a search. Returns False for every other request."""
        custom = req.sampling_params.custom_params
        if not isinstance(custom, dict) or "ets" not in custom:
            return False
        if is_retracted or req.to_finish is not None or req.finished():
            return False
        if not self.scheduler._set_or_validate_priority(req):
            self.scheduler._release_aborted_request(req)
            return True
        try:
            config = carried_config(req, self.scheduler.server_args._ets)
        except (TypeError, ValueError) as error:  # custom_params can also come straight from a client
            prepare_abort(req, f"custom_params['ets'] is wrong: {error}", status_code=HTTPStatus.BAD_REQUEST)
            self.scheduler.output_streamer.stream_output([req], False)
            return True
        config = replace(config, max_tokens=max(1, min(config.max_tokens, req.sampling_params.max_new_tokens)))
        live = LiveSearch(req, config, Search(config, len(req.origin_input_ids)))
        with self.guard(live):
            self._begin(live)
        return True

    def _begin(self, live: LiveSearch) -> None:
        refusal = self._refusal(live)
        if refusal:
            self._answer_error(live, refusal, HTTPStatus.BAD_REQUEST)
            return
        live.req.time_stats.set_wait_queue_entry_time()
        self.searches[live.owner] = live
        self.metrics.sync(self)
        # One request brings the prompt into the cache; otherwise every child of the first level would compute it.
        self._queue_child(live, ROOT, (), 0)

    def _refusal(self, live: LiveSearch) -> str | None:
        pool = self.scheduler.max_total_num_tokens
        need = live.prompt_tokens + live.config.max_tokens + 1
        if need > pool:
            return (
                f"one trajectory may need {need} KV tokens (prompt {live.prompt_tokens} + max_tokens "
                f"{live.config.max_tokens} + 1) but the pool holds {pool}; lower max_tokens or raise --max-total-tokens"
            )
        if live.config.deadline_s is not None and get_parallel().tp_size > 1:
            return "deadline_s needs tensor parallel size 1, because ranks must not decide by their own clocks; omit it"
        return self.prm.refusal(live.req.origin_input_ids, prompt_text(live.req), live.config.max_tokens)

    # ---- events from the engine ----

    def after_batch(self, batch: Any) -> None:
        """Children of this batch that finished become events; complete levels are scored and selected."""
        for req in batch.reqs:
            if isinstance(req, ChildReq) and req.finished() and req.rid in req.live.children:
                with self.guard(req.live):
                    self._child_done(req)
        self._scoring.run_when_due()
        self._forget_drained()

    def before_batch(self) -> None:
        """Once per tick: take in finished selections and answers, and end searches whose time is up."""
        self._wait_if_idle()
        for live in list(self.searches.values()):
            with self.guard(live):
                self._take_result(live)
                self._check_deadline(live)
        self._scoring.run_when_due()
        self._forget_drained()

    def after_plan(self, plan: Any) -> None:
        """Break a standstill: see `pressure.relieve`."""
        relieve(self, plan)

    def swallow_abort(self, req: Any) -> bool:
        """A child that left the waiting queue is an event for its search, not an answer for a client."""
        if not isinstance(req, ChildReq):
            return False
        live = req.live
        if live.children.pop(req.rid, None) is not None and not live.is_answered:
            with self.guard(live):
                self._child_failed(live, req.node_id, "aborted while it waited")
        return True

    def before_abort(self, recv_req: AbortReq) -> None:
        """The client went away or gave up: answer its search with the abort and let sglang end the children."""
        for live in list(self.searches.values()):
            if not live.is_answered and (recv_req.abort_all or live.req.rid.startswith(recv_req.rid)):
                live.end_reason = "aborted"
                self._answer_error(live, recv_req.abort_message or "Aborted", None)
                self._drop_all(live)

    def after_abort(self) -> None:
        self._forget_drained()

    def _child_done(self, child: ChildReq) -> None:
        live = child.live
        del live.children[child.rid]
        end = step_end(child)
        if end.kind == "failed":
            if not live.is_answered:
                self._child_failed(live, child.node_id, end.reason)
            return
        hold = self.ledger.hold(live.owner, child.last_node)
        if live.is_answered:
            self.ledger.drop([hold], live.prompt_tokens)
        elif child.node_id == ROOT:
            self._prompt_ready(live, hold)
        else:
            self._step_ready(live, child, hold, end)

    def _prompt_ready(self, live: LiveSearch, hold: Hold) -> None:
        branch = Branch((), "", hold)
        live.branches[ROOT] = branch
        branch.prm = self.prm.open_prompt(tuple(live.req.origin_input_ids), prompt_text(live.req), live.owner)
        live.prm_tokens += len(branch.prm.token_ids)
        self.apply(live, live.search.start())

    def _step_ready(self, live: LiveSearch, child: ChildReq, hold: Hold, end: Any) -> None:
        node = live.search.tree.nodes[child.node_id]
        parent = live.branches[node.parent.id]
        step_ids = tuple(child.output_ids_through_stop)
        token_ids = parent.token_ids + step_ids
        text = live.req.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        step_text = text[len(parent.text) :] if text.startswith(parent.text) else text
        if end.stop_text is not None and end.stop_text in step_text:
            step_text = step_text[: step_text.index(end.stop_text)]
        live.branches[node.id] = Branch(token_ids, parent.text + step_text, hold)
        self._one_child_less(live, node.parent.id)
        self.apply(live, live.search.on_step(node.id, step_ids, step_text, end.kind))

    def _child_failed(self, live: LiveSearch, node_id: int, reason: str) -> None:
        if node_id == ROOT:
            self.fail(live, f"the prompt could not be computed: {reason}")
            return
        parent_id = live.search.tree.nodes[node_id].parent.id
        self._one_child_less(live, parent_id)
        self.one_score_less(live, parent_id)
        self.apply(live, live.search.on_failed(node_id, reason))

    # ---- actions of a search ----

    def apply(self, live: LiveSearch, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Expand():
                    self._expand(live, action)
                case Score():
                    self._scoring.add(live, action.node_id)
                case Measure():
                    live.loop_ms.append(0.0)
                    with live.on_loop():
                        live.sample_kv(self.ledger, action.depth)
                    self.metrics.level_done(self, live)
                case Select():
                    self._select(live, action)
                case Prune():
                    self.drop(live, action.node_ids)
                case Complete():
                    self.drop(live, [action.node_id])
                case Finish():
                    self._finish(live, action.reason)

    def _expand(self, live: LiveSearch, action: Expand) -> None:
        branch = live.branches[action.parent_id]
        branch.is_tip = False
        branch.num_open_children += len(action.node_ids)
        branch.num_unscored_children += len(action.node_ids)
        for node_id in action.node_ids:
            self._queue_child(live, node_id, branch.token_ids, action.max_new_tokens)

    def _queue_child(self, live: LiveSearch, node_id: int, token_ids: Sequence[int], max_new_tokens: int) -> None:
        # Past the queue limit on purpose: the client's request was admitted, its children are not new requests.
        child = make_child(live, node_id, token_ids, max_new_tokens)
        live.children[child.rid] = child
        self.scheduler.waiting_queue.append(child)
        child.time_stats.set_wait_queue_entry_time()
        child.arrival_processed_tokens = self.scheduler.processed_tokens_counter

    def _select(self, live: LiveSearch, action: Select) -> None:
        live.select_started_s = time.perf_counter()
        with live.on_loop():
            # A leaf keeps its Hold object even when pressure took its lock, so the costs stay complete.
            holds = [hold for node_id in action.leaf_ids if (hold := live.branches[node_id].hold) is not None]
            ends = live.paths.ends(holds)
            policy = self._policies[live.config.algorithm]
            if live.config.is_solved and get_parallel().tp_size == 1:
                live.awaited = ("select", self._workers.submit(live.decide, policy, ends))
                selection = None
            else:
                # Ranks must take the decision in the same tick, so with tensor parallelism the loop waits for it.
                selection = live.decide(policy, ends)
        live.select_blocked_ms.append(live.loop_ms[-1])
        if selection is not None:
            self._selected(live, selection)

    def _selected(self, live: LiveSearch, selection: Selection) -> None:
        with live.on_loop():
            if selection.solver is not None:
                live.solver_reports.append(selection.solver)
            live.num_fallbacks += selection.is_fallback
            self.metrics.selected(live, selection, time.perf_counter() - live.select_started_s)
            self.apply(live, live.search.on_selected(selection))
            live.sample_retained()
            report_progress(self, live)

    def _take_result(self, live: LiveSearch) -> None:
        if live.awaited is None or not live.awaited[1].done():
            return
        (kind, future), live.awaited = live.awaited, None
        if kind == "select":
            self._selected(live, future.result())
        else:
            self._answer(live, future.result())

    def _check_deadline(self, live: LiveSearch) -> None:
        limit = live.config.deadline_s
        if limit is None or live.is_answered or live.end_reason or time.monotonic() - live.started_s < limit:
            return
        live.awaited = None
        self.apply(live, live.search.stop("deadline"))

    # ---- KV ----

    def _one_child_less(self, live: LiveSearch, node_id: int) -> None:
        """Children hold the path through their own locks, so a node gives up its lock with the last of them."""
        branch = live.branches[node_id]
        branch.num_open_children -= 1
        if branch.num_open_children == 0 and branch.hold is not None and node_id != ROOT:
            self.ledger.drop([branch.hold], live.prompt_tokens)

    def one_score_less(self, live: LiveSearch, node_id: int) -> None:
        branch = live.branches.get(node_id)
        if branch is None:
            return
        branch.num_unscored_children -= 1
        if branch.num_unscored_children == 0 and branch.prm is not None and node_id != ROOT:
            self.prm.drop([branch.prm])

    def drop(self, live: LiveSearch, node_ids: Sequence[int]) -> None:
        """Give back at once what only these nodes hold, in both caches."""
        branches = [live.branches[node_id] for node_id in node_ids]
        for branch in branches:
            branch.is_tip = False
        self.ledger.drop((branch.hold for branch in branches if branch.hold is not None), live.prompt_tokens)
        self.prm.drop([branch.prm for branch in branches if branch.prm is not None])

    def _drop_all(self, live: LiveSearch) -> None:
        live.awaited = None
        self.drop(live, [node_id for node_id in sorted(live.branches) if node_id != ROOT])
        root = live.branches.get(ROOT)
        if root is not None:
            if root.hold is not None:
                self.ledger.release(root.hold)  # the prompt stays cached for the next request
            if root.prm is not None:
                self.prm.release(root.prm)
        live.branches.clear()

    # ---- ends ----

    def _finish(self, live: LiveSearch, reason: str) -> None:
        live.end_reason = reason
        live.awaited = ("answer", self._voting.submit(answerable(live), live.config, get_parallel().tp_size))
        self._abort_children(live)

    def _answer(self, live: LiveSearch, answers: list[RankedAnswer]) -> None:
        if not answers:
            self.fail(live, f"no trajectory was completed ({live.end_reason})")
            return
        req = live.req
        result = result_of(live, answers)
        req.output_ids = array("q", answers[0].token_ids)
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
        req.customized_info = {RESULT_KEY: [result]}
        self._send(live)
        self._drop_all(live)
        self.num_done += 1
        logger.info("%s", finished_line(result))

    def fail(self, live: LiveSearch, message: str) -> None:
        live.end_reason = live.end_reason or "failed"
        self._answer_error(live, f"search failed: {message}", HTTPStatus.INTERNAL_SERVER_ERROR)
        self._drop_all(live)
        self._abort_children(live)

    def _answer_error(self, live: LiveSearch, message: str, status: HTTPStatus | None) -> None:
        self.num_failed += 1
        logger.warning("search %s ended without an answer: %s", live.owner, message)
        live.req.finished_reason = FINISH_ABORT(message, status)
        self._send(live)

    def _send(self, live: LiveSearch) -> None:
        live.is_answered = True
        self.metrics.ended(self, live, time.monotonic() - live.started_s)
        live.req.time_stats.set_completion_time()
        self.scheduler.output_streamer.stream_output([live.req], False)

    def _abort_children(self, live: LiveSearch) -> None:
        if live.children:
            self.scheduler.abort_request(AbortReq(rid=f"{live.req.rid}/"))

    @contextmanager
    def guard(self, live: LiveSearch) -> Iterator[None]:
        """A bug in one search must not end the server: whatever escapes fails this search and is logged."""
        try:
            yield
        except Exception as error:  # the one boundary between a search and the scheduler loop
            logger.exception("search %s failed", live.owner)
            if live.is_answered:
                self._drop_all(live)
            else:
                self.fail(live, f"{type(error).__name__}: {error}")

    def _forget_drained(self) -> None:
        for rid in [rid for rid, live in self.searches.items() if live.is_over]:
            live = self.searches.pop(rid)
            with self.guard(live):
                self.ledger.end_owner(live.owner)
                self.prm.end_owner(live.owner)
            self.metrics.sync(self)

    def _wait_if_idle(self) -> None:
        """With nothing else to do, let the worker thread have the interpreter instead of spinning."""
        if self.scheduler.running_batch.is_empty() and not self.scheduler.waiting_queue:
            futures = [live.awaited[1] for live in self.searches.values() if live.awaited is not None]
            if futures:
                wait(futures, timeout=IDLE_WAIT_S, return_when=FIRST_COMPLETED)

    def describe(self) -> dict[str, Any]:
        """For `/server_info`: what the searches of this scheduler hold right now."""
        return state_of(self)
