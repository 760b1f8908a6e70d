"""Searches for their live pages: the running ones and the last that ended, as the scheduler reported them.

The tree lives in the scheduler, the pages in the HTTP process. What changed in a tree travels beside the progress of a
stream (`engine.progress.report_progress`); `TraceStore` puts it together again. Nothing here runs without `--search-trace`.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_ets.wire import RESULT_KEY, TRACE_KEY

MAX_ENDED = 32
MAX_ENDED_BYTES = 64 << 20  # of ended searches, compressed
REFUSED_STATUS = 400


@dataclass(eq=False)
class Trace:
    """One search as far as the scheduler has reported it. Written by `TraceStore` on the event loop; pages read."""

    id: str
    title: str
    figures: dict[str, Any]
    started_s: float = field(default_factory=time.time)  # since the epoch
    state: str = "running"  # later what ended it
    note: str = ""  # why there is no answer
    version: int = 0  # grows with every change
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set at the next change, then replaced
    cached: tuple[int, str] = (-1, "")  # version and page data of a running search, for all who watch it
    _part: int = 0
    _prompt_tokens: int = 0
    _nodes: dict[int, dict[str, Any]] = field(default_factory=dict)
    _choices: list[dict[str, Any]] | None = None
    _packed: bytes = b""  # the content of an ended search, compressed

    @property
    def is_live(self) -> bool:
        return self.state == "running"

    @property
    def num_bytes(self) -> int:
        """What an ended search takes."""
        return len(self._packed)

    def content(self) -> dict[str, Any]:
        """An answer with its tree, as `view.read_view` takes it; the tree of a search that has just begun is empty.

        The nodes are shared, but never changed: a later report replaces them.
        """
        if self._packed:
            unpacked: dict[str, Any] = json.loads(zlib.decompress(self._packed))
            return unpacked
        tree = {"prompt_tokens": self._prompt_tokens, "nodes": [self._nodes[i] for i in sorted(self._nodes)]}
        plain: dict[str, Any] = {"search": {**self.figures, "tree": tree}}
        if self._choices is not None:
            plain["choices"] = self._choices
        return plain

    def add(self, reports: Iterable[Mapping[str, Any]]) -> None:
        """Take in reports of the scheduler; those that came before are passed over."""
        for report in reports:
            update = report.get(TRACE_KEY)
            if update is None or update["part"] <= self._part:
                continue
            self._part, self._prompt_tokens = update["part"], update["prompt_tokens"]
            self._nodes.update((node["id"], node) for node in update["nodes"])
            self.figures = update["figures"]
            if "results" in report:
                self._choices = [_choice(answer) for answer in report["results"]]
            self.notify()

    def end(self, state: str, note: str) -> None:
        """No more will come. What is kept of it is small."""
        self.state, self.note = state, note
        self._packed = zlib.compress(json.dumps(self.content()).encode(), 1)
        self._nodes, self._choices, self.cached = {}, None, (-1, "")
        self.notify()

    def notify(self) -> None:
        """Wake whoever watches."""
        self.version += 1
        awaited, self.changed = self.changed, asyncio.Event()
        awaited.set()


class TraceStore:
    """Running searches, and the last that ended: bounded in number and in bytes. Used on one event loop."""

    def __init__(self, max_ended: int = MAX_ENDED, max_ended_bytes: int = MAX_ENDED_BYTES) -> None:
        self.max_ended = max_ended
        self._max_ended_bytes = max_ended_bytes
        self._traces: dict[str, Trace] = {}  # ended ones in the order of their ends

    def begin(self, search_id: str, title: str, figures: dict[str, Any]) -> Trace:
        """A search is about to be sent. One that ended under the same id is forgotten."""
        trace = self._traces[search_id] = Trace(search_id, title, figures)
        return trace

    def get(self, search_id: str) -> Trace | None:
        return self._traces.get(search_id)

    def newest_first(self) -> list[Trace]:
        return sorted(self._traces.values(), key=lambda trace: -trace.started_s)

    async def follow(self, trace: Trace, sent: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """What the scheduler sends for this search, unchanged, while the trace grows with it."""
        try:
            async for answered in sent:
                self._take(trace, answered)
                yield answered
        except ValueError:
            self._forget(trace)  # never admitted
            raise
        finally:
            self._end(trace, "aborted", "the client went away")

    def _take(self, trace: Trace, answered: Mapping[str, Any]) -> None:
        info = answered["meta_info"]
        trace.add(info.get(RESULT_KEY) or ())
        reason = info.get("finish_reason")
        if not reason:
            return
        if reason.get("type") != "abort":
            self._end(trace, trace.figures.get("finish_reason") or "complete", "")
        elif reason.get("status_code") == REFUSED_STATUS:
            self._forget(trace)
        else:
            self._end(trace, "failed", " ".join(str(reason.get("message") or "the search failed").split()))

    def _end(self, trace: Trace, state: str, note: str) -> None:
        """Once for each search; later calls change nothing."""
        if not trace.is_live:
            return
        trace.end(state, note)
        if self._traces.get(trace.id) is not trace:
            return
        del self._traces[trace.id]
        self._traces[trace.id] = trace
        ended = [kept for kept in self._traces.values() if not kept.is_live]
        total = sum(kept.num_bytes for kept in ended)
        for oldest in ended[:-1]:  # the newest stays, however large
            if len(ended) <= self.max_ended and total <= self._max_ended_bytes:
                break
            ended = ended[1:]
            total -= oldest.num_bytes
            del self._traces[oldest.id]

    def _forget(self, trace: Trace) -> None:
        """A request that was refused is no search."""
        if trace.is_live:
            trace.end("refused", "the request was refused")
        if self._traces.get(trace.id) is trace:
            del self._traces[trace.id]


def _choice(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A ranked result as a choice of a response."""
    details = {key: answer[key] for key in ("score", "votes", "answer")}
    return {"text": answer["text"], "finish_reason": answer["finish_reason"], "search": details}


TRACES = TraceStore()  # of this API server: the endpoints write it, the pages read it
