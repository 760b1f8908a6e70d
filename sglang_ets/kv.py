"""The radix ledger: the one owner of every lock that a search holds on a radix cache.

A search keeps the KV of its unfinished trajectories by locking the radix node at which each of them ends. The tree core
answers who owns which tokens; nothing here counts tokens by itself. Two rules keep the tree core safe: a lock is undone
exactly once (`Hold` is idempotent), and a node is evicted only after a fresh look showed it to be an unlocked leaf,
because the tree core cannot be used any more after a wrong unlock or eviction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_ets.ilp import CostTree


class LedgerImbalance(RuntimeError):
    """A bug: an owner that has ended still holds locks."""


@dataclass(eq=False)
class Hold:
    """One lock on the path from the radix root to `node`; made and ended by `RadixLedger` alone."""

    owner: str
    node: int
    tokens: int  # length of the locked path when the hold was made, in tokens
    receipt: Any = field(repr=False, default=None)

    @property
    def locked(self) -> bool:
        """Whether the KV of the path is still protected from eviction."""
        return self.receipt is not None


@dataclass(frozen=True)
class PathSpan:
    """A radix node on a path: the half-open token range of the path whose KV it keeps."""

    node: int
    start: int
    end: int
    num_children: int
    is_resident: bool


@dataclass(frozen=True)
class PathSnapshot:
    """Paths of some holds at one moment, as the tree core gave them. Safe to read on any thread."""

    paths: Mapping[int, Sequence[Any]]  # radix node -> the nodes from the root to it
    ends: Sequence[tuple[int | None, int]]  # per hold its node (None: it lost its lock) and the tokens of its path
    keep_tokens: int

    def cost_tree(self) -> CostTree:
        """The paths as a forest of radix nodes, cost = tokens of KV beyond the first `keep_tokens`.

        The tokens of the prompt cost nothing: they are held whichever leaves are kept. A hold that lost its lock (see
        `RadixLedger.release`) stands as a node of its own with the tokens it would need again.
        """
        index: dict[int, int] = {}
        parent: list[int] = []
        cost: list[float] = []
        for path in self.paths.values():
            at = -1
            for span in path:
                if span.node_id not in index:
                    index[span.node_id] = len(parent)
                    parent.append(at)
                    cost.append(float(max(0, span.path_end - max(span.path_start, self.keep_tokens))))
                at = index[span.node_id]
        leaf = []
        for node, tokens in self.ends:
            if node is None or not self.paths[node]:
                index[node := -1 - len(parent)] = len(parent)
                parent.append(-1)
                cost.append(float(max(0, tokens - self.keep_tokens)))
            leaf.append(index[node])
        return CostTree(np.array(parent, dtype=np.int64), np.array(cost), np.array(leaf, dtype=np.int64))


class RadixLedger:
    """Locks, immediate eviction and KV accounting over one radix cache. Not thread-safe: scheduler thread only."""

    def __init__(self, tree_cache: Any, allocator: Any) -> None:
        self._cache = tree_cache
        self._allocator = allocator
        self._holds: dict[str, dict[int, Hold]] = {}
        self.freed_tokens = 0  # tokens given back at once by `drop`, over the life of the server

    def hold(self, owner: str, node: int) -> Hold:
        """Lock the path that ends at `node` in the name of `owner`."""
        span = self._path(node)
        hold = Hold(owner, node, span[-1].end if span else 0, self._cache.lock(node))
        self._holds.setdefault(owner, {})[id(hold)] = hold
        return hold

    def release(self, hold: Hold) -> None:
        """Unlock; the KV stays cached until the LRU walk takes it. Idempotent."""
        if hold.receipt is None:
            return
        receipt, hold.receipt = hold.receipt, None
        self._cache.unlock(receipt)
        held = self._holds[hold.owner]
        del held[id(hold)]
        if not held:
            del self._holds[hold.owner]

    def drop(self, hold: Hold, keep_tokens: int = 0) -> int:
        """Unlock and free at once what nobody else uses, from the leaf up to `keep_tokens` (the prompt, as a rule).

        Returns the tokens given back to the allocator. A hold that was already released frees nothing: its node may
        have become someone else's since.
        """
        if hold.receipt is None:
            return 0
        self.release(hold)
        freed = 0
        node = hold.node
        while True:
            path = self._path(node)
            if not self._can_evict(path, keep_tokens):
                break
            before = self._allocator.available_size()
            tracker = dict.fromkeys(self._cache.tree_components, 0)
            if self._cache._evict_device_leaf(node, tracker) is not None:
                break  # a write-back cache wants to copy the node to the host first: leave it to the LRU walk
            freed += self._allocator.available_size() - before
            if len(path) < 2:
                break
            node = path[-2].node
        self.freed_tokens += freed
        return freed

    def end_owner(self, owner: str) -> None:
        """Check that `owner` holds nothing any more.

        Raises:
            LedgerImbalance: locks are left; they are released before it is raised, so that the server stays sound.
        """
        left = list(self._holds.get(owner, {}).values())
        if not left:
            return
        tokens = self.unique_tokens(left)
        for hold in left:
            self.release(hold)
        raise LedgerImbalance(
            f"search {owner} ended with {len(left)} locks on {tokens} KV tokens; expected 0 locks on 0"
        )

    def held_tokens(self, owner: str | None = None) -> int:
        """Distinct tokens whose KV `owner` (or, by default, anybody) protects."""
        owners = [owner] if owner is not None else list(self._holds)
        return self.unique_tokens([hold for name in owners for hold in self._holds.get(name, {}).values()])

    @property
    def num_holds(self) -> int:
        """Locks held now, over all owners."""
        return sum(len(holds) for holds in self._holds.values())

    def unique_tokens(self, holds: Sequence[Hold]) -> int:
        """Tokens of the union of the holds' paths, as the tree core reports it."""
        spans = {span.node: span.end - span.start for path in self._paths(holds) for span in path}
        return sum(spans.values())

    def snapshot(self, holds: Sequence[Hold], keep_tokens: int) -> PathSnapshot:
        """The holds' paths as they are now, asked once per radix node. All that must happen on the scheduler's thread."""
        nodes = sorted({hold.node for hold in holds if hold.locked})
        paths = dict(zip(nodes, self._cache.tree_core.collect_path_info(nodes), strict=True)) if nodes else {}
        ends = [(hold.node if hold.locked else None, hold.tokens) for hold in holds]
        return PathSnapshot(paths, ends, keep_tokens)

    def cost_tree(self, holds: Sequence[Hold], keep_tokens: int) -> CostTree:
        """`PathSnapshot.cost_tree` of the paths as they are now."""
        return self.snapshot(holds, keep_tokens).cost_tree()

    def _can_evict(self, path: Sequence[PathSpan], keep_tokens: int) -> bool:
        """Whether the path's last node is an unlocked, resident leaf beyond `keep_tokens`."""
        if not path:
            return False
        last = path[-1]
        if last.num_children or not last.is_resident or last.start < keep_tokens:
            return False
        # The lock count of a node cannot be read: locking an unlocked leaf protects at least its own tokens.
        protected = self._cache.protected_size()
        receipt = self._cache.lock(last.node)
        gained = self._cache.protected_size() - protected
        self._cache.unlock(receipt)
        return bool(gained >= last.end - last.start)

    def _paths(self, holds: Sequence[Hold]) -> list[list[PathSpan]]:
        """Paths of the locked holds in one call to the tree core; an empty path for a hold without a lock."""
        locked = [hold.node for hold in holds if hold.locked]
        if not locked:
            return [[] for _ in holds]
        infos = iter(self._cache.tree_core.collect_path_info(locked))
        return [_spans(next(infos)) if hold.locked else [] for hold in holds]

    def _path(self, node: int) -> list[PathSpan]:
        try:
            return _spans(self._cache.tree_core.collect_path_info([node])[0])
        except KeyError:
            return []  # evicted since: the tree core forgets the ids of nodes it drops


def _spans(path: Sequence[Any]) -> list[PathSpan]:
    return [PathSpan(n.node_id, n.path_start, n.path_end, n.num_children, n.full_value_len is not None) for n in path]
