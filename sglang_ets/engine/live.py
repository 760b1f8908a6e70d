"""One live search as the engine sees it: which KV, PRM path and requests belong to which node, and its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from sglang_ets.core.capacity import Need
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import SolverReport
from sglang_ets.core.kv_costs import token_costs
from sglang_ets.core.search import Search
from sglang_ets.core.selection import Selection, SelectionPolicy, checked
from sglang_ets.core.speculation import Forecast, forecast
from sglang_ets.core.tree import Node
from sglang_ets.engine.guesses import Guesses
from sglang_ets.engine.tree_changes import TreeChanges
from sglang_ets.kv import Hold, PathSnapshot, RadixLedger
from sglang_ets.wire import TRACE_PARAM

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ets.engine.children import ChildSpec
    from sglang_ets.prm.steps import PrmPath, SampledStates

ROOT = 0  # node id of the prompt
# How steps start: with nodes of equal tokens in one row of the batch, each in a row of its own, or with a prefill each.
ForkMode = Literal["shared", "decode", "extend"]
Kind = Literal["select", "answer", "guess"]  # of work that another thread does for a search


@dataclass
class Branch:
    """What the engine keeps for one node: the locks on its KV in both caches, and who still needs them."""

    hold: Hold | None = None
    prm: PrmPath | None = None
    is_tip: bool = True  # the trajectory ends here and may still grow
    num_open_children: int = 0
    num_unscored_children: int = 0
    states: SampledStates | None = None  # of its step, until it is scored; None: nobody reads them
    num_pending_tokens: int = 0  # at the end, whose text comes with the next step: see `step_text`


@dataclass(frozen=True)
class KvSample:
    """KV held by one search when a level was complete and, after pruning, when the next one began (tokens)."""

    depth: int  # number of the level, which is the depth of its steps unless a leaf was revived
    num_leaves: int
    held_tokens: int
    referenced_tokens: int
    retained_tokens: int | None = None


@dataclass(eq=False)
class LiveSearch:
    """A search from admission to the end of its last internal request. Owned by the coordinator."""

    spec: ChildSpec
    search: Search
    branches: dict[int, Branch] = field(default_factory=dict)
    children: set[str] = field(default_factory=set)  # ids of the internal requests in the engine
    forks: ForkMode = "extend"
    parted: dict[str, Hold] = field(default_factory=dict)  # what children that left a strand start from, by their ids
    guesses: Guesses = field(default_factory=Guesses)
    tokens_computed: int = 0  # by the policy model for steps; the prompt aside
    awaited: tuple[Kind, Future[Any] | None] | None = None  # no future: on the first rank
    # Of all holds when the last level was complete.
    paths: PathSnapshot = field(default_factory=lambda: PathSnapshot({}))
    kv: list[KvSample] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    is_answered: bool = False
    end_reason: str = ""  # why it has ended, which is before it is answered; empty while it grows
    final_text: str = ""  # what every answer that is still possible begins with
    prm_tokens: int = 0
    num_pressure_releases: int = 0
    num_prm_releases: int = 0  # locks given up in the PRM's pool, known at the end
    num_fallbacks: int = 0
    kv_cost_weight_max: float | None = None  # the largest weight by which a level was decided; None: the one asked for
    notes: list[str] = field(default_factory=list)  # warnings of whoever ranks the answers
    select_started_s: float = 0.0  # of the last selection, by time.perf_counter
    # Per level, the loop's time until selection had been handed over; and that with pruning and queueing of children.
    select_blocked_ms: list[float] = field(default_factory=list)
    loop_ms: list[float] = field(default_factory=list)
    solver_reports: list[SolverReport] = field(default_factory=list)
    changes: TreeChanges | None = None  # for the live page of this search; None: nobody traces it

    def __post_init__(self) -> None:
        if (self.req.sampling_params.custom_params or {}).get(TRACE_PARAM) is True:
            self.changes = TreeChanges()

    @property
    def id(self) -> str:
        """Name of the search in this process: of its locks in the ledger, and what the ids of its children begin with."""
        return self.spec.search_id

    @property
    def req(self) -> Req:
        """The client's request."""
        return self.spec.parent

    @property
    def rid(self) -> str:
        """The client's name for this search."""
        return str(self.req.rid)

    @property
    def prompt_tokens(self) -> int:
        return len(self.req.origin_input_ids)

    @property
    def prompt_need(self) -> Need:
        """What the prompt takes; the PRM's own tokens are about as many."""
        return Need(self.prompt_tokens, self.prompt_tokens)

    @property
    def need(self) -> Need:
        """The peak so far. What the PRM holds is taken from its distinct tokens of the steps that the policy model holds."""
        peak = max((sample.held_tokens for sample in self.kv), default=self.prompt_tokens)
        generated = sum(len(node.token_ids) for node in self.search.tree.nodes)
        return Need(peak, round(peak * self.prm_tokens / (self.prompt_tokens + generated)) if generated else peak)

    @property
    def has_ended(self) -> bool:
        """It grows no further: it has its answer or error, or waits for its answers to be ranked."""
        return self.is_answered or self.end_reason != ""

    @property
    def deadline_s(self) -> float | None:
        """After how long it must be answered with what it has; None: nothing waits for a clock."""
        return None if self.has_ended else self.search.config.deadline_s

    @property
    def is_over(self) -> bool:
        """Answered, and none of its internal requests is left in the engine."""
        return self.is_answered and not self.children and not self.guesses.children

    def waits_for(self, child_id: str) -> bool:
        """Whether it has begun this child, which has not ended."""
        return child_id in self.children or child_id in self.guesses.children

    def left(self, child_id: str) -> bool:
        """This child, for which it waits, has left the engine. Returns whether it was a guess."""
        self.guesses.is_due = True  # a row is free
        self.children.discard(child_id)
        return self.guesses.children.pop(child_id, None) is not None

    @contextmanager
    def on_loop(self) -> Iterator[None]:
        """What happens inside takes time of the scheduler loop for the present level."""
        started = time.perf_counter()
        yield
        self.loop_ms[-1] += (time.perf_counter() - started) * 1e3

    def parent_id(self, node_id: int) -> int:
        """The node that `node_id` continues."""
        return self.parent_of(self.search.tree.nodes[node_id]).id

    @staticmethod
    def parent_of(node: Node) -> Node:
        """Raises:
        ValueError: the root was asked about, which has none.
        """
        if node.parent is None:
            raise ValueError("the root of a search tree has no parent")
        return node.parent

    def holds(self) -> list[Hold]:
        """Locks of the trajectories that may still grow, in the order of their nodes. Those of guesses are not among them."""
        held = [branch.hold for _, branch in sorted(self.branches.items())]
        return [hold for hold in (*held, *self.parted.values()) if hold is not None and hold.locked]

    def holds_by_promise(self) -> list[Hold]:
        """The same with the least promising trajectory first, by its last score; last the prompt, and steps that parted."""
        nodes = self.search.tree.nodes

        def promise(item: tuple[int, Branch]) -> tuple[bool, float, int]:
            return item[0] == ROOT, nodes[item[0]].score or 0.0, item[0]

        ordered = [branch.hold for _, branch in sorted(self.branches.items(), key=promise)]
        return [hold for hold in (*ordered, *self.parted.values()) if hold is not None and hold.locked]

    def decide(self, policy: SelectionPolicy, leaf_ids: Sequence[int], config: SearchConfig) -> Selection:
        """Decide the level of these leaves by these settings.

        Pure, on a worker thread as a rule: the search does not change while it waits for this.
        """
        tree, costs = self.search.tree, None
        if config.reads_costs:
            costs = token_costs([tree.trajectory_token_ids(tree.nodes[leaf_id]) for leaf_id in leaf_ids])
        level = self.search.level(costs)
        return checked(policy.select(level, config), level, config.algorithm)

    def forecast(self, policy: SelectionPolicy) -> Callable[[], Forecast] | None:
        """What would be decided of the leaves that have their scores; None if it is too early, or too late, to ask.

        The call may be made on a worker thread while the search goes on.
        """
        config, leaves, tree = self.search.config, self.search.scored_leaves(), self.search.tree
        if not leaves:
            return None
        level = self.search.partial_level(leaves)
        trajectories = [tree.trajectory_token_ids(leaf) for leaf in leaves] if config.reads_costs else []

        def choose() -> Forecast:
            part = replace(level, kv=token_costs(trajectories)) if config.reads_costs else level
            return forecast(leaves, checked(policy.select(part, config), part, config.algorithm).allocation)

        return choose

    def sample_kv(self, ledger: RadixLedger, depth: int) -> None:
        """Record the KV held now, a level being complete. Unique tokens come from the radix cache."""
        holds = self.holds()
        self.paths = ledger.snapshot(holds)
        num_leaves = referenced = 0
        for node_id, branch in self.branches.items():
            if node_id == ROOT:
                continue
            count = branch.is_tip + branch.num_open_children  # trajectories that reference it
            num_leaves += count
            referenced += count * (self.prompt_tokens + self.search.tree.nodes[node_id].trajectory_tokens)
        self.kv.append(KvSample(depth, num_leaves, self.paths.unique_tokens(holds), referenced))

    def sample_retained(self) -> None:
        """Complete the last record with what is still held after pruning."""
        if self.kv:
            self.kv[-1] = replace(self.kv[-1], retained_tokens=self.paths.unique_tokens(self.holds()))
