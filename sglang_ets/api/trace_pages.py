"""`GET /search`, `/search/{id}` and `/search/{id}/events`: the searches of this server as pages that follow them.

The page is the one of `sglang-ets view`; while the search runs it asks for server-sent events, each of them the whole view
after a level. Without `--search-trace` every path answers with one sentence that names the flag.
"""

from __future__ import annotations

import asyncio
import html
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from sglang_ets.api.protocol import error_body
from sglang_ets.api.trace import TRACES, Trace, TraceStore
from sglang_ets.api.view import SearchView, empty_view, page_data, read_view, render

KEEP_ALIVE_S = 15.0  # proxies cut connections on which nothing comes for long
MAX_SHOWN_CHARS = 120
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
LISTING = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>Searches</title>
<style>:root { color-scheme: light dark } body { font: 14px/1.5 system-ui, sans-serif; margin: 1.5em }
td, th { text-align: left; padding: 2px 14px 2px 0; font-weight: 400 } th { opacity: .7 }</style></head>
<body><h1>Searches</h1><table><tr>COLUMNS</tr>
ROWS</table></body></html>"""
COLUMNS = ("search", "algorithm", "width", "levels", "state", "seconds")


def add_routes(app: FastAPI, settings: Mapping[str, Any], store: TraceStore = TRACES) -> None:
    """Put the pages on sglang's app. Does nothing the second time."""
    if getattr(app.state, "ets_pages", None) is not None:
        return
    pages = SearchPages(store, bool(settings.get("trace")))
    app.state.ets_pages = pages
    # A client may choose an id with slashes, so the longer path comes first and the id takes the rest.
    app.add_api_route("/search", pages.listing, methods=["GET"], response_model=None)
    app.add_api_route("/search/{search_id:path}/events", pages.events, methods=["GET"], response_model=None)
    app.add_api_route("/search/{search_id:path}", pages.page, methods=["GET"], response_model=None)


class SearchPages:
    """The handlers. What they show is made on a worker thread: a large tree must not hold up the event loop."""

    def __init__(self, store: TraceStore, is_on: bool) -> None:
        self._store = store
        self._is_on = is_on

    async def listing(self, request: Request) -> Response:
        """Searches that run or ran last, newest first; a page for browsers, JSON for all others."""
        if not self._is_on:
            return self._not_traced()
        rows = [_row(trace) for trace in self._store.newest_first()]
        if "text/html" not in request.headers.get("accept", ""):
            return _json({"searches": rows})
        # Half a character, which a client can send as an escape, has no UTF-8.
        return HTMLResponse(_listing_page(rows).encode("utf-8", "replace"), headers=HEADERS)

    async def page(self, search_id: str) -> Response:
        """One search's tree. It follows the search while that runs."""
        trace = self._store.get(search_id)
        if not self._is_on or trace is None:
            return self._not_traced() if not self._is_on else self._unknown(search_id)
        content, view_of = trace.content, _view_of(trace)
        page = await asyncio.get_running_loop().run_in_executor(None, lambda: render(view_of(content())))
        return HTMLResponse(page, headers=HEADERS)

    async def events(self, search_id: str) -> Response:
        """The view after each level, as server-sent events; the last one shows the end."""
        trace = self._store.get(search_id)
        if not self._is_on or trace is None:
            return self._not_traced() if not self._is_on else self._unknown(search_id)
        return StreamingResponse(_events(trace), media_type="text/event-stream", headers=HEADERS)

    def _unknown(self, search_id: str) -> Response:
        return _missing(
            f"no search {search_id[:MAX_SHOWN_CHARS]!r} is known; the server keeps running searches and up to "
            f"{self._store.max_ended} that ended, listed at /search"
        )

    def _not_traced(self) -> Response:
        return _missing("this server traces no searches; start it with --search-trace or with SGLANG_ETS_TRACE=1")


async def _events(trace: Trace) -> AsyncIterator[str]:
    """A watcher that is slower than the search misses levels, never the newest one."""
    seen = -1
    while seen != trace.version:
        changed, seen = trace.changed, trace.version
        is_live = trace.is_live
        yield f"id: {seen}\ndata: {await _data_of(trace)}\n\n"
        while is_live and seen == trace.version:
            try:
                await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
            except asyncio.TimeoutError:
                yield ": still running\n\n"


async def _data_of(trace: Trace) -> str:
    """The page data of this moment. Made once for all who watch a running search."""
    version, text = trace.cached
    if version == trace.version:
        return text
    version, content, view_of = trace.version, trace.content(), _view_of(trace)
    text = await asyncio.get_running_loop().run_in_executor(None, lambda: page_data(view_of(content)))
    if trace.is_live and version > trace.cached[0]:
        trace.cached = (version, text)
    return text


def _view_of(trace: Trace) -> Any:
    """A function from content to view that looks at the trace no more: it runs on another thread."""
    title, is_live, note = trace.title, trace.is_live, trace.note

    def view_of(content: dict[str, Any]) -> SearchView:
        has_steps = bool(content["search"]["tree"]["nodes"])
        view = read_view(content, title) if has_steps else empty_view(content, title)
        return replace(view, is_live=is_live, note=note)

    return view_of


def _row(trace: Trace) -> dict[str, Any]:
    figures = trace.figures
    seconds = time.time() - trace.started_s if trace.is_live else figures.get("seconds")
    return {
        "id": trace.id,
        "page": f"/search/{quote(trace.id, safe='')}",
        "title": trace.title,
        "algorithm": figures.get("algorithm"),
        "width": figures.get("width"),
        "levels": figures.get("levels", 0),
        "state": trace.state,
        "note": trace.note or "; ".join(figures.get("warnings") or ()),
        "seconds": None if seconds is None else round(seconds, 2),
    }


def _listing_page(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        link = f'<a href="{html.escape(row["page"])}">{html.escape(row["title"])}</a>'
        cells = [link, *(html.escape("-" if row[name] is None else str(row[name])) for name in COLUMNS[1:])]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n")
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return LISTING.replace("COLUMNS", head).replace("ROWS", "".join(lines) or "<tr><td>none yet</td></tr>\n")


def _json(body: dict[str, Any], status: int = 200) -> Response:
    """In ASCII, so that any text can be sent."""
    return Response(json.dumps(body), status, headers=HEADERS, media_type="application/json")


def _missing(message: str) -> Response:
    return _json(error_body(message, "NotFound", 404), 404)
