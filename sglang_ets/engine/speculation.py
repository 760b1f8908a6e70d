"""No waiting at the barrier: where rows are left, children of good leaves begin before their level is complete.

A level is complete when its longest step has ended; until then its other rows are empty. So the policy is asked about the
leaves that have their scores already, and what it would keep goes on, as a guess. A child's seed comes from its place in the
tree, so what a guess generates is what the child would generate that selection makes at this place. If selection does, the
guess becomes this child; if not, it is given up. The search knows nothing of it, and its tree is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_ets.core.speculation import Guess
from sglang_ets.engine.children import ChildReq, Member, make_child
from sglang_ets.engine.forks import ForkRoom, Forks
from sglang_ets.engine.guesses import Ended
from sglang_ets.engine.live import LiveSearch
from sglang_ets.engine.step_queue import StepQueue
from sglang_ets.kv import RadixLedger

NOT_KEPT = "selection did not keep the leaf"


class Speculation:
    """Begins guesses, and gives them to their nodes or up. Scheduler thread only."""

    def __init__(self, scheduler: Any, ledger: RadixLedger, steps: StepQueue, forks: Forks) -> None:
        self._scheduler = scheduler
        self._ledger = ledger
        self._steps = steps
        self._forks = forks

    def start(self, searches: Sequence[LiveSearch]) -> None:
        """Begin what these searches, which run, may guess now. Whatever waits for a row or for KV goes before all guesses."""
        due = [live for live in searches if _may_guess(live)]
        if not due or self._scheduler.waiting_queue or self._steps.num_pending:
            return
        room = self._forks.room()
        for live in due:
            self._start(live, room)

    def _start(self, live: LiveSearch, room: ForkRoom) -> None:
        most = min(room.rows, self._steps.num_free)
        if most < 1:
            return
        guesses = live.guesses
        made = live.search.guesses(guesses.expected, guesses.num_begun, guesses.num_running, most)
        guesses.is_due = bool(made)
        self._begin(live, [guess for guess in made if all(room.take(guess.max_new_tokens) for _ in range(guess.count))])

    def _begin(self, live: LiveSearch, made: Sequence[Guess]) -> None:
        """Queue a child for each guess, or for all that continue the same tokens."""
        guesses, tree = live.guesses, live.search.tree
        rows: dict[tuple[tuple[int, ...], int], tuple[Guess, list[Member]]] = {}
        for guess in made:
            leaf = tree.nodes[guess.leaf_id]
            token_ids = tree.trajectory_token_ids(leaf)
            for index in range(guess.first, guess.first + guess.count):
                guesses.num_children += 1
                member = live.spec.member(-guesses.num_children, (*tree.place(leaf), index))
                guesses.members[leaf.id, index] = member
                row = token_ids, 0 if live.forks == "shared" else member.node_id
                rows.setdefault(row, (guess, []))[1].append(member)
            guesses.num_leaves += leaf.id not in guesses.num_begun
            guesses.num_begun[leaf.id] = guess.first + guess.count
        for (token_ids, _), (guess, members) in rows.items():
            source = live.branches[guess.leaf_id].hold if live.forks != "extend" else None
            child = make_child(live.spec, members, token_ids, guess.max_new_tokens, source)
            guesses.children[child.rid] = child
            self._steps.add(live.id, child)

    def ended(self, live: LiveSearch, ended: Sequence[Ended]) -> None:
        """Guesses have ended. Those with a step wait for selection; what failed begins again if selection wants it."""
        guesses = live.guesses
        guesses.is_due = True
        guesses.ended += [one for one in ended if one.holds]
        for child in (one.child for one in ended if one.child.members and not one.holds):
            guesses.members = {
                place: member for place, member in guesses.members.items() if member not in child.members
            }
            self._forget(live, child)

    def decide(self, live: LiveSearch) -> tuple[list[Ended], dict[int, int]]:
        """Selection has claimed what it wants: this is the search's own from here on, and the rest is given up.

        Returns what has ended of the search's own, and the nodes whose steps must begin anew, with the room of each: those
        that a strand held of which selection does not want the first member, by whose seed its row is drawn.
        """
        own, anew = self._settle(live, lambda member: member.node_id >= 0)
        live.guesses.is_stopped = False
        live.guesses.num_used -= len(anew)
        return own, anew

    def give_up(self, live: LiveSearch) -> None:
        """Nobody wants these guesses, and there are no more in this level."""
        self._settle(live, lambda _member: False)
        live.guesses.is_stopped = True

    def _settle(self, live: LiveSearch, is_wanted: Callable[[Member], bool]) -> tuple[list[Ended], dict[int, int]]:
        guesses = live.guesses
        own = [self._split(live, ended, is_wanted) for ended in guesses.ended]
        unwanted: list[ChildReq] = []
        anew: dict[int, int] = {}
        for rid, child in list(guesses.children.items()):
            if not child.members:
                continue  # given up before
            wanted = tuple(member for member in child.members if is_wanted(member))
            if wanted[:1] != child.members[:1]:
                unwanted.append(child)
                room = child.sampling_params.max_new_tokens - child.num_given
                anew |= {member.node_id: room for member in wanted}
                continue
            child.members = wanted
            live.children.add(rid)
            del guesses.children[rid]
            if rid in guesses.parted:
                live.parted[rid] = guesses.parted.pop(rid)
        self._ledger.drop(guesses.parted.values(), live.prompt_tokens)
        guesses.parted, guesses.ended, guesses.members, guesses.num_begun, guesses.expected = {}, [], {}, {}, ()
        self._leave(live, unwanted)
        return [ended for ended in own if ended.holds], anew

    def _split(self, live: LiveSearch, ended: Ended, is_wanted: Callable[[Member], bool]) -> Ended:
        """What is wanted of a guess that has ended."""
        pairs = list(zip(ended.child.members, ended.holds, strict=True))
        wanted = [(member, hold) for member, hold in pairs if is_wanted(member)]
        self._ledger.drop([hold for member, hold in pairs if not is_wanted(member)], live.prompt_tokens)
        if wanted:
            ended.child.members = tuple(member for member, _ in wanted)
        else:
            self._forget(live, ended.child)
        return Ended(ended.child, [hold for _, hold in wanted])

    def _leave(self, live: LiveSearch, children: Sequence[ChildReq]) -> None:
        """End children that nobody wants, wherever they are."""
        for child in children:
            self._forget(live, child)
        for rid in self._steps.remove(live.id, {child.rid for child in children}):
            del live.guesses.children[rid]
        for child in children:
            if child.rid in live.guesses.children:
                child.to_finish = FINISH_ABORT(NOT_KEPT)  # with its next token

    def _forget(self, live: LiveSearch, child: ChildReq) -> None:
        child.members = ()
        live.guesses.tokens_wasted += child.num_computed


def _may_guess(live: LiveSearch) -> bool:
    """A search that once had to give up KV guesses no more."""
    guesses = live.guesses
    is_possible = live.search.speculates and not live.has_ended and not live.num_pressure_releases
    return is_possible and guesses.is_due and not guesses.is_stopped
