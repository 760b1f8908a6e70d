"""One live search as the engine sees it: which KV, PRM path and requests belong to which node, and its figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sglang_ets.answer import RankedAnswer
from sglang_ets.config import SearchConfig
from sglang_ets.kv import Hold, PathSnapshot, RadixLedger
from sglang_ets.search import Search
from sglang_ets.selection import Selection, SelectionPolicy
from sglang_ets.trace import TRACE_KEY, TRACE_PARAM, TreeNews

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ets.children import ChildReq
    from sglang_ets.prm.engine import PrmPath

ROOT = 0  # node id of the prompt


@dataclass
class Branch:
    """What the engine keeps for one node: the locks on its KV in both caches and its text so far."""

    token_ids: tuple[int, ...]  # policy model's tokens of the trajectory, without the prompt
    text: str  # text of the trajectory, without the prompt
    hold: Hold | None = None
    prm: PrmPath | None = None
    is_tip: bool = True  # the trajectory ends here and may still grow
    num_open_children: int = 0
    num_unscored_children: int = 0


@dataclass(frozen=True)
class KvSample:
    """KV held by one search when a level was complete and, after pruning, when the next one began (tokens)."""

    depth: int
    num_leaves: int
    held_tokens: int
    referenced_tokens: int
    retained_tokens: int | None = None


@dataclass
class LiveSearch:
    """A search from admission to the end of its last internal request. Owned by the coordinator."""

    req: Req
    config: SearchConfig
    search: Search
    branches: dict[int, Branch] = field(default_factory=dict)
    children: dict[str, ChildReq] = field(default_factory=dict)
    awaited: tuple[Literal["select", "answer"], Future[Any]] | None = None
    # Of all holds when the last level was complete.
    paths: PathSnapshot = field(default_factory=lambda: PathSnapshot({}))
    kv: list[KvSample] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    is_answered: bool = False
    end_reason: str = ""
    final_text: str = ""  # what every answer that is still possible begins with
    prm_tokens: int = 0
    num_pressure_releases: int = 0
    num_fallbacks: int = 0
    select_started_s: float = 0.0  # of the last selection, by time.perf_counter
    # Per level, the loop's time until selection had been handed over; and that with pruning and queueing of children.
    select_blocked_ms: list[float] = field(default_factory=list)
    loop_ms: list[float] = field(default_factory=list)
    solver_reports: list[Any] = field(default_factory=list)
    news: TreeNews | None = None  # what the live page of this search has not been told; None: nobody traces it

    def __post_init__(self) -> None:
        if (self.req.sampling_params.custom_params or {}).get(TRACE_PARAM) is True:
            self.news = TreeNews()

    @property
    def owner(self) -> str:
        """Name under which the ledger knows this search."""
        return str(self.req.rid)

    @property
    def prompt_tokens(self) -> int:
        return len(self.req.origin_input_ids)

    @property
    def is_over(self) -> bool:
        """Answered, and none of its internal requests is left in the engine."""
        return self.is_answered and not self.children

    @contextmanager
    def on_loop(self) -> Iterator[None]:
        """What happens inside takes time of the scheduler loop for the present level."""
        started = time.perf_counter()
        yield
        self.loop_ms[-1] += (time.perf_counter() - started) * 1e3

    def holds(self) -> list[Hold]:
        """Locks of the trajectories that may still grow, in the order of their nodes."""
        return [b.hold for _, b in sorted(self.branches.items()) if b.hold is not None and b.hold.locked]

    def decide(self, policy: SelectionPolicy, ends: Sequence[tuple[int | None, int]]) -> Selection:
        """Decide one level of leaves with these ends (see `PathSnapshot.ends`).

        Pure, on a worker thread as a rule: the search does not change while it waits for this.
        """
        costs = self.paths.cost_tree(ends, self.prompt_tokens) if self.config.is_solved else None
        return policy.select(self.search.level(costs), self.config)

    def sample_kv(self, ledger: RadixLedger, depth: int) -> None:
        """Record the KV held now, a level being complete. Unique tokens come from the radix cache."""
        holds = self.holds()
        self.paths = ledger.snapshot(holds)
        branches = [branch for node_id, branch in sorted(self.branches.items()) if node_id != ROOT]
        counts = [branch.is_tip + branch.num_open_children for branch in branches]  # trajectories that reference it
        referenced = sum(n * (self.prompt_tokens + len(b.token_ids)) for n, b in zip(counts, branches, strict=True))
        self.kv.append(KvSample(depth, sum(counts), self.paths.unique_tokens(holds), referenced))

    def sample_retained(self) -> None:
        """Complete the last record with what is still held after pruning."""
        if self.kv:
            last = self.kv[-1]
            retained = self.paths.unique_tokens(self.holds())
            self.kv[-1] = KvSample(last.depth, last.num_leaves, last.held_tokens, last.referenced_tokens, retained)


def result_of(live: LiveSearch, answers: list[RankedAnswer]) -> dict[str, Any]:
    """What travels back to the API server: ranked results, usage and figures, as plain data."""
    completion_tokens = sum(len(node.token_ids) for node in live.search.tree.nodes)
    returned = answers[: live.config.num_results]
    result: dict[str, Any] = {
        "results": [_answer_dict(answer) for answer in returned],
        "usage": {
            "prompt_tokens": live.prompt_tokens,
            "completion_tokens": completion_tokens,
            "answer_tokens": sum(len(answer.token_ids) for answer in returned),
            "prm_tokens": live.prm_tokens,
        },
        "search": figures_of(live),
    }
    if live.news is not None:
        result[TRACE_KEY] = news_of(live, live.news)
    if live.config.return_tree:
        result["tree"] = live.search.tree.to_dict(with_embeddings=live.config.return_embeddings)
    return result


def _answer_dict(answer: RankedAnswer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "score": answer.score,
        "step_scores": list(answer.step_scores),
        "answer": answer.answer,
        "votes": answer.votes,
    }


def news_of(live: LiveSearch, news: TreeNews) -> dict[str, Any]:
    """What a live page needs beyond what it was told before: the figures so far, and the steps that changed."""
    return {"figures": figures_of(live), **news.take(live.search.tree)}


def figures_of(live: LiveSearch) -> dict[str, Any]:
    """`metadata.search` of a response without the tree, or how far it is while the search runs."""
    nodes = [node for node in live.search.tree.nodes if node.id != ROOT]
    config = live.config
    held = [sample.held_tokens for sample in live.kv] or [0]
    referenced = [sample.referenced_tokens for sample in live.kv] or [0]
    retained = [sample.retained_tokens for sample in live.kv if sample.retained_tokens is not None] or [0]
    return {
        "id": live.owner,
        "algorithm": config.algorithm,
        "width": config.width,
        "seed": config.seed,
        "rebase_temperature": config.rebase_temperature,
        "kv_cost_weight": config.cost_weight,
        "diversity_weight": config.coverage_weight,
        "finish_reason": live.end_reason,
        "levels": len(live.kv),
        "nodes_made": len(nodes),
        "nodes_retained": sum(node.state in ("retained", "complete") for node in nodes),
        "nodes_pruned": sum(node.state == "pruned" for node in nodes),
        "nodes_failed": sum(node.state == "failed" for node in nodes),
        "kv_tokens_peak": max(held),
        "kv_tokens_mean": sum(held) / len(held),
        "kv_retained_mean": sum(retained) / len(retained),
        "kv_referenced_peak": max(referenced),
        "kv_referenced_mean": sum(referenced) / len(referenced),
        "kv_levels": [
            {
                "depth": sample.depth,
                "leaves": sample.num_leaves,
                "held": sample.held_tokens,
                "referenced": sample.referenced_tokens,
                "retained": sample.retained_tokens,
            }
            for sample in live.kv
        ],
        "kv_pressure_releases": live.num_pressure_releases,
        "prm_tokens": live.prm_tokens,
        "solver": _solver_figures(live),
        "seconds": time.monotonic() - live.started_s,
    }


def _solver_figures(live: LiveSearch) -> dict[str, Any]:
    reports = live.solver_reports
    return {
        "calls": len(reports),
        "fallbacks": live.num_fallbacks,
        "statuses": sorted({str(report.status) for report in reports}),
        "build_ms": sum(report.build_ms for report in reports),
        "solve_ms": sum(report.solve_ms for report in reports),
        "loop_blocked_ms_max": max(live.select_blocked_ms, default=0.0),
        "level_loop_ms_mean": sum(live.loop_ms) / max(1, len(live.loop_ms)),
        "level_loop_ms_max": max(live.loop_ms, default=0.0),
    }
