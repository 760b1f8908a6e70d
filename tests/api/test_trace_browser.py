"""A live page in Chromium: it draws each level as it comes, without being loaded again."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.middleware.base import RequestResponseEndpoint

from sglang_ets.api.trace import TraceStore
from sglang_ets.api.trace_pages import add_routes
from tests.api.test_trace import progress, result, sent_by_scheduler
from tests.api.test_view import BROWSER_LIMIT_S, CHROMIUM, needs_chromium

START_LIMIT_S = 20.0
ARRIVAL_S = 0.5  # for the last event, which has been sent, to reach the page


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a free local port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        end = time.monotonic() + START_LIMIT_S
        while not server.started and time.monotonic() < end:
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@needs_chromium
def test_a_page_that_was_loaded_before_the_first_step_shows_the_end(tmp_path: Path) -> None:
    app, store = FastAPI(), TraceStore()
    add_routes(app, {"trace": True}, store)

    growing: list[asyncio.Task[None]] = []

    async def grow() -> None:
        trace = store.get("a")
        assert trace is not None
        reports = [progress(depth) for depth in range(1, 6)] + [result(6)]
        async for _ in store.follow(trace, sent_by_scheduler(reports, type="length")):
            pass

    @app.middleware("http")
    async def grow_once_followed(request: Request, call_next: RequestResponseEndpoint) -> Response:
        """The search runs to its end once the page has asked for its events."""
        response = await call_next(request)
        if request.url.path == "/search/a":
            page = b"".join([part async for part in response.body_iterator])  # type: ignore[attr-defined]
            return HTMLResponse(page.replace(b"</body>", b'<script>fetch("/until-the-end")</script></body>'))
        if request.url.path.endswith("/events") and not growing:
            growing.append(asyncio.create_task(grow()))
        return response

    @app.get("/until-the-end")
    async def until_the_end() -> Response:
        """Chromium's clock stands while the page loads something; without it the page may be dumped before its last frame."""
        while not growing:
            await asyncio.sleep(0.02)
        await growing[0]
        await asyncio.sleep(ARRIVAL_S)
        return Response(status_code=204)

    @app.get("/begin")
    async def begin() -> dict[str, str]:
        store.begin("a", "1+2=", {"algorithm": "ets", "width": 16})
        return {}

    with served(app) as url:
        subprocess.run(["curl", "-sf", f"{url}/begin"], check=True, capture_output=True, timeout=START_LIMIT_S)
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", f"{url}/search/a"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_LIMIT_S, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert int(re.findall(r'data-updates="(\d+)"', done.stdout)[0]) > 0
    assert 'data-drawn="96"' in done.stdout
    assert '<p id="live" role="status" hidden="">' in done.stdout
