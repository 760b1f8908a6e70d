"""One live search as the engine sees it: which KV, PRM path and requests belong to which node, and its figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.search import Search
from sglang_ets.core.selection import Selection, SelectionPolicy
from sglang_ets.engine.tree_updates import TreeNews
from sglang_ets.kv import Hold, PathSnapshot, RadixLedger
from sglang_ets.wire import TRACE_PARAM

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ets.engine.children import ChildReq
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
