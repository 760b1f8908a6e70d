"""What of a search's answer is known before its end.

After each selection every trajectory that can still be an answer is either complete or runs through a retained leaf. The
text that all of these begin with can no longer change: it is final. The same rule holds for searches that nobody
streams, so that a stream and its answer never differ: see `answerable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sglang_ets.core.answer import Trajectory
from sglang_ets.core.tree import Node
from sglang_ets.engine.figures import news_of
from sglang_ets.engine.live import LiveSearch
from sglang_ets.wire import PROGRESS_KEY, RESULT_KEY, TRACE_KEY

if TYPE_CHECKING:
    from sglang_ets.engine.coordinator import SearchCoordinator


@dataclass(frozen=True)
class Progress:
    """How far a search is. `text` is final: every answer that the search can still give begins with it."""

    level: int
    retained: int  # leaves that go on
    complete: int  # trajectories that have ended
    best_score: float | None  # of the last steps of these and those
    kv_held_tokens: int  # distinct KV tokens that the search protects
    text: str


def report_progress(coordinator: SearchCoordinator, live: LiveSearch) -> None:
    """After a selection: fix the final text and, if the client streams, send it with the figures of the level.

    A search that is traced is a stream for the API server whatever its client asked for, and its tree goes along.

    Text and figures travel beside the tokens, as the result does: no token of the request leaves before its end, because
    the tokens of the shared text may differ from trajectory to trajectory.
    """
    if live.is_answered or live.search.is_over:
        return
    complete, retained = live.search.tree.complete(), _growing(live)
    ends = [*complete, *retained]
    live.final_text = shared_prefix([live.branches[node.id].text for node in ends])
    if not live.req.stream:
        return
    progress = Progress(
        level=max((node.depth for node in retained), default=0),
        retained=len(retained),
        complete=len(complete),
        best_score=max((node.score for node in ends if node.score is not None), default=None),
        kv_held_tokens=coordinator.ledger.held_tokens(live.owner),
        text=live.final_text,
    )
    report: dict[str, Any] = {PROGRESS_KEY: asdict(progress)}
    if live.news is not None:
        report[TRACE_KEY] = news_of(live, live.news)
    live.req.customized_info = {RESULT_KEY: [report]}
    coordinator.scheduler.output_streamer.stream_output([live.req], False)


def _growing(live: LiveSearch) -> list[Node]:
    """Nodes under which a step is being made, in order of creation."""
    nodes = live.search.tree.nodes
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
