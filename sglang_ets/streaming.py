"""What of a search's answer is known before its end, and the chunks that carry it to the client.

After each selection every trajectory that can still be an answer is either complete or runs through a retained leaf. The
text that all of these begin with can no longer change: it is final. The same rule holds for searches that nobody
streams, so that a stream and its answer never differ: see `answerable`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sglang_ets.protocol import RESULT_KEY, details_of, finish_reason_of, head_of, metadata_of, usage_of
from sglang_ets.trace import TRACE_KEY

if TYPE_CHECKING:
    from sglang_ets.answer import Trajectory
    from sglang_ets.coordinator import SearchCoordinator
    from sglang_ets.live import LiveSearch
    from sglang_ets.tree import Node

PROGRESS_KEY = "progress"
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Progress:
    """How far a search is. `text` is final: every answer that the search can still give begins with it."""

    level: int
    retained: int  # leaves that go on
    complete: int  # trajectories that have ended
    best_score: float | None  # of the last steps of these and those
    kv_held_tokens: int  # distinct KV tokens that the search protects
    text: str


# ---- in the scheduler ----


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
        from sglang_ets.live import news_of

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


# ---- in the API server ----


async def stream_chunks(
    request: Any, rid: str, first: Mapping[str, Any], rest: AsyncIterator[Mapping[str, Any]]
) -> AsyncIterator[str]:
    """Server-sent events of a search: final text and progress as they become known, then the ranked choices.

    Only choice 0 streams early: whether there is a second answer is known at the end. `first` has the first report of the
    scheduler (see `last_report`), `rest` what it sends after; a busy server may hand out several at once. A search that
    fails on the way ends with an error event.
    """
    writer = _Writer(request, rid)
    answered = first
    while True:
        for event in writer.levels(answered):
            yield event
        report = last_report(answered)
        if report is None or PROGRESS_KEY not in report:
            break
        following = await anext(rest, None)
        reason = (following or {"meta_info": {}})["meta_info"].get("finish_reason")
        if following is None or (reason and reason.get("type") == "abort"):
            yield writer.error((reason or {}).get("message") or "the scheduler returned no result")
            yield DONE
            return
        answered = following
    for event in writer.result(report or {}):
        yield event
    yield DONE


def last_report(answered: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest report in what the tokenizer manager hands out; it keeps all earlier ones before it."""
    reports = answered["meta_info"].get(RESULT_KEY)
    return dict(reports[-1]) if reports else None


class _Writer:
    """Chunks of one stream, and how much of choice 0 has been sent."""

    def __init__(self, request: Any, rid: str) -> None:
        self._request = request
        self._is_chat = hasattr(request, "messages")
        self._head = head_of(request, rid, "chat.completion.chunk" if self._is_chat else "text_completion")
        self._sent = ""
        self._level = 0

    def levels(self, answered: Mapping[str, Any]) -> Iterator[str]:
        """One event for each level that was not told yet."""
        for report in answered["meta_info"].get(RESULT_KEY) or ():
            if PROGRESS_KEY in report and report[PROGRESS_KEY]["level"] > self._level:
                yield self._progress(report[PROGRESS_KEY])

    def _progress(self, progress: Mapping[str, Any]) -> str:
        figures = {key: value for key, value in progress.items() if key != "text"}
        text = progress["text"][len(self._sent) :]
        is_first = not self._sent
        self._sent, self._level = progress["text"], progress["level"]
        choice = {"index": 0, **self._text(text, is_first), "finish_reason": None}
        return self._event([choice], metadata={"search": {PROGRESS_KEY: figures}})

    def result(self, result: Mapping[str, Any]) -> Iterator[str]:
        last = len(result["results"]) - 1
        for index, answer in enumerate(result["results"]):
            sent = self._sent if index == 0 else ""
            choice = {"index": index, **self._text(answer["text"][len(sent) :], not sent), "finish_reason": None}
            yield self._event([choice])
            end = {"finish_reason": finish_reason_of(answer), "search": details_of(answer)}
            figures = {"metadata": metadata_of(result)} if index == last else {}
            yield self._event([{"index": index, **self._text("", False), **end}], **figures)
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield self._event([], usage=usage_of(result))

    def error(self, message: str) -> str:
        body = {"message": " ".join(message.split()), "type": "SearchFailed", "param": None, "code": 500}
        return f"data: {json.dumps({'error': body}, ensure_ascii=False)}\n\n"

    def _text(self, text: str, is_first: bool) -> dict[str, Any]:
        """The piece of text as its endpoint writes it; the role of a chat stands in the choice's first chunk."""
        if not self._is_chat:
            return {"text": text}
        role = {"role": "assistant"} if is_first else {}
        return {"delta": {**role, "content": text} if text or is_first else role}

    def _event(self, choices: list[dict[str, Any]], **fields: Any) -> str:
        return f"data: {json.dumps({**self._head, 'choices': choices, **fields}, ensure_ascii=False)}\n\n"
