"""The radix ledger: the one owner of every lock that a search holds on a radix cache.

A search keeps the KV of its unfinished trajectories by locking the radix node at which each of them ends. The tree core
answers who owns which tokens; nothing here counts tokens by itself. Two rules keep the tree core safe: a lock is undone
exactly once (`Hold` is idempotent), and a node is evicted only after a fresh look showed it to be an unlocked leaf,
because the tree core cannot be used any more after a wrong unlock or eviction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


class LedgerImbalance(RuntimeError):
    """A bug: an owner that has ended still holds locks."""


@dataclass(eq=False)
class Hold:
    """One lock on the path from the radix root to `node`; made and ended by `RadixLedger` alone."""

    owner: str
    node: int
    receipt: Any = field(repr=False, default=None)

    @property
    def locked(self) -> bool:
        """Whether the KV of the path is still protected from eviction."""
        return self.receipt is not None


@dataclass(frozen=True)
class PathSnapshot:
    """Paths of some radix nodes at one moment, as the tree core gave them. Safe to read on any thread."""

    paths: Mapping[int, Sequence[Any]]  # radix node -> the nodes from the root to it

    def unique_tokens(self, holds: Sequence[Hold]) -> int:
        """Tokens of KV in the union of the paths of those holds that are still locked."""
        nodes = {hold.node for hold in holds if hold.locked}
        spans = {span.node_id: span.path_end - span.path_start for node in nodes for span in self.paths[node]}
        return sum(spans.values())


class RadixLedger:
    """Locks, immediate eviction and KV accounting over one radix cache. Not thread-safe: scheduler thread only."""

    def __init__(self, tree_cache: Any, allocator: Any) -> None:
        self._cache = tree_cache
        self._allocator = allocator
        self._holds: dict[str, dict[int, Hold]] = {}
        self.freed_tokens = 0  # tokens given back at once by `drop`, over the life of the server

    def hold(self, owner: str, node: int) -> Hold:
        """Lock the path that ends at `node` in the name of `owner`."""
        hold = Hold(owner, node, self._cache.lock(node))
        self._holds.setdefault(owner, {})[id(hold)] = hold
        return hold

    def release(self, hold: Hold) -> None:
        """Unlock; the KV stays cached until the LRU walk takes it. Idempotent."""
        self._unlock(hold)

    def drop(self, holds: Iterable[Hold], keep_tokens: int = 0) -> int:
        """Unlock and free at once what nobody else uses, from the leaves up to `keep_tokens` (the prompt, as a rule).

        Returns the tokens given back to the allocator. A hold that was already released frees nothing: its node may
        have become someone else's since.
        """
        ended = [hold for hold in holds if hold.locked]
        paths = self._collect({hold.node for hold in ended})
        for hold in ended:
            self._unlock(hold)
        before = self._allocator.available_size()
        num_children = {span.node_id: span.num_children for path in paths.values() for span in path}
        evicted: set[int] = set()
        with self._one_free():
            for path in paths.values():
                for span in reversed(path):
                    if span.node_id in evicted:
                        continue
                    if num_children[span.node_id] or span.path_start < keep_tokens or not self._evict(span):
                        break
                    evicted.add(span.node_id)
                    if span.parent_id in num_children:
                        num_children[span.parent_id] -= 1
        freed = int(self._allocator.available_size() - before)
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

    def forget_locks(self) -> None:
        """The cache was emptied, and with it all locks: what holds them is told. Nothing is unlocked."""
        for hold in [hold for held in self._holds.values() for hold in held.values()]:
            hold.receipt = None
        self._holds.clear()

    def holds(self, owner: str) -> list[Hold]:
        """What `owner` has locked, the oldest first."""
        return list(self._holds.get(owner, {}).values())

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
        return self.snapshot(holds).unique_tokens(holds)

    def snapshot(self, holds: Sequence[Hold]) -> PathSnapshot:
        """The locked holds' paths as they are now, asked once per radix node, on the scheduler's thread."""
        return PathSnapshot(self._collect({hold.node for hold in holds if hold.locked}))

    def _unlock(self, hold: Hold) -> None:
        if not hold.locked:
            return
        receipt, hold.receipt = hold.receipt, None
        self._cache.unlock(receipt)
        held = self._holds[hold.owner]
        del held[id(hold)]
        if not held:
            del self._holds[hold.owner]

    @contextmanager
    def _one_free(self) -> Iterator[None]:
        """What is freed inside goes back to the allocator at once: each free by itself copies its whole list of free slots."""
        if self._allocator.free_group is not None:  # sglang gathers frees already, and groups do not nest
            yield
            return
        self._allocator.free_group_begin()
        try:
            yield
        finally:
            self._allocator.free_group_end()

    def _evict(self, leaf: Any) -> bool:
        """Evict a node that has no children, or had some when it was looked at. Returns False if it must stay."""
        if leaf.num_children:
            leaf = self._look(leaf.node_id)
        if leaf is None or leaf.num_children or leaf.full_value_len is None:
            return False
        # The lock count of a node cannot be read: locking an unlocked leaf protects at least its own tokens.
        protected = self._cache.protected_size()
        receipt = self._cache.lock(leaf.node_id)
        gained = self._cache.protected_size() - protected
        self._cache.unlock(receipt)
        if gained < leaf.path_end - leaf.path_start:
            return False
        tracker = dict.fromkeys(self._cache.tree_components, 0)
        # A write-back cache wants to copy the node to the host first: then it is left to the LRU walk.
        return self._cache._evict_device_leaf(leaf.node_id, tracker) is None

    def _collect(self, nodes: Iterable[int]) -> dict[int, Sequence[Any]]:
        """Per node the nodes from the root to it; in order, so that all ranks do the same."""
        ordered = sorted(nodes)
        return dict(zip(ordered, self._cache.tree_core.collect_path_info(ordered), strict=True)) if ordered else {}

    def _look(self, node: int) -> Any:
        """The node as it is now; None if the tree core has dropped it, or is the root, which has no entry."""
        try:
            path = self._collect([node])[node]
        except KeyError:
            return None
        return path[-1] if path else None
