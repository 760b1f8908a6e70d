"""What of a search's answer is known before its end.

After each selection every trajectory that can still be an answer is either complete or runs through a retained leaf, or
through a pruned one that may be revived. The text that all of these begin with can no longer change: it is final. The same
rule holds for searches that nobody streams, so that a stream and its answer never differ: see `answerable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_ets.core.answer import Trajectory
from sglang_ets.core.search import Search
from sglang_ets.core.tree import Node, SearchTree
from sglang_ets.engine.figures import changes_of
from sglang_ets.engine.live import LiveSearch
from sglang_ets.wire import PROGRESS_KEY, TRACE_KEY


@dataclass(frozen=True)
class Progress:
    """How far a search is. `text` is final: every answer that the search can still give begins with it."""

    level: int
    retained: int  # leaves that go on
    complete: int  # trajectories that have ended
    best_score: float | None  # of the last steps of these and those
    kv_held_tokens: int  # distinct KV tokens that the search protects
    text: str


def shared_text(search: Search) -> str:
    """The text that every answer which is still possible begins with, a selection having been made."""
    tree = search.tree
    return shared_prefix(
        [tree.trajectory_text(node) for node in (*tree.complete(), *_growing(tree), *search.revivable)]
    )


def progress_report(live: LiveSearch, kv_held_tokens: int) -> dict[str, Any]:
    """The figures of the level with the final text; if the search is traced, its tree goes along.

    Text and figures travel beside the tokens, as the result does: no token of the request leaves before its end, because
    the tokens of the shared text may differ from trajectory to trajectory.
    """
    tree = live.search.tree
    complete, retained = tree.complete(), _growing(tree)
    progress = Progress(
        level=max(0, tree.nodes[-1].level - 1),
        retained=len(retained),
        complete=len(complete),
        best_score=max((node.score for node in (*complete, *retained) if node.score is not None), default=None),
        kv_held_tokens=kv_held_tokens,
        text=live.final_text,
    )
    report: dict[str, Any] = {PROGRESS_KEY: asdict(progress)}
    if live.changes is not None:
        report[TRACE_KEY] = changes_of(live, live.changes)
    return report


def _growing(tree: SearchTree) -> list[Node]:
    """Nodes under which a step is being made, in order of creation."""
    nodes = tree.nodes
    parents = {node.parent.id for node in nodes if node.state == "open" and node.finish is None and node.parent}
    return [nodes[node_id] for node_id in sorted(parents)]


def shared_prefix(texts: Sequence[str]) -> str:
    """The longest text that all of `texts` begin with; empty for none.

    What the least and the greatest in lexicographic order share, all between them share.
    """
    least, greatest = min(texts, default=""), max(texts, default="")
    length = next((i for i, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b), len(least))
    return least[:length]


def answerable(live: LiveSearch) -> list[Trajectory]:
    """The trajectories of an ended search that can be answers: those that begin with its final text.

    Complete ones always do. An unfinished one may be what selection gave up earlier: the parent of pruned steps.
    """
    return [t for t in live.search.trajectories() if t.text.startswith(live.final_text)]
