"""When the nodes of a search give up what they hold in the two caches."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_ets.engine.live import ROOT, LiveSearch
from sglang_ets.kv import RadixLedger
from sglang_ets.prm.steps import StepScorer


class SearchLocks:
    """Locks on the policy model's KV (`ledger`) and on the PRM's, by node. The prompt's stay until the search ends."""

    def __init__(self, ledger: RadixLedger, prm: StepScorer) -> None:
        self._ledger = ledger
        self._prm = prm

    def child_ended(self, live: LiveSearch, node_id: int) -> None:
        """Children hold the path through their own locks, so a node gives up its lock with the last of them."""
        branch = live.branches[node_id]
        branch.num_open_children -= 1
        if branch.num_open_children == 0 and branch.hold is not None and node_id != ROOT:
            self._ledger.drop([branch.hold], live.prompt_tokens)

    def child_scored(self, live: LiveSearch, node_id: int) -> None:
        """The same on the PRM's side, where a child has its own lock once it is scored (or never will be)."""
        branch = live.branches.get(node_id)
        if branch is None:
            return
        branch.num_unscored_children -= 1
        if branch.num_unscored_children == 0 and branch.prm is not None and node_id != ROOT:
            self._prm.drop([branch.prm])

    def drop(self, live: LiveSearch, node_ids: Iterable[int]) -> None:
        """Give back at once what only these nodes hold, in both caches."""
        branches = [live.branches[node_id] for node_id in node_ids]
        for branch in branches:
            branch.is_tip = False
        self._ledger.drop((branch.hold for branch in branches if branch.hold is not None), live.prompt_tokens)
        self._prm.drop([branch.prm for branch in branches if branch.prm is not None])

    def start_from(self, live: LiveSearch, child_id: str) -> None:
        """A child is in the engine, which locks what it needs: what it started from is held no longer for it."""
        hold = live.parted.pop(child_id, None) or live.guesses.parted.pop(child_id, None)
        if hold is not None:
            self._ledger.release(hold)

    def drop_parted(self, live: LiveSearch) -> None:
        """No child starts any more."""
        self._ledger.drop(live.parted.values(), live.prompt_tokens)
        live.parted.clear()

    def drop_all(self, live: LiveSearch) -> None:
        """The search has ended: nothing of it stays locked; its prompt stays cached for the next request."""
        self.drop_parted(live)
        self.drop(live, [node_id for node_id in sorted(live.branches) if node_id != ROOT])
        root = live.branches.get(ROOT)
        if root is not None:
            if root.hold is not None:
                self._ledger.release(root.hold)
            if root.prm is not None:
                self._prm.release(root.prm)
        live.branches.clear()
