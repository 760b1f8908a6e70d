"""Live pages without a server: what is told of a tree, what is kept of it, and what the routes answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sglang_ets.api import serving, trace_pages
from sglang_ets.api.serving import answer
from sglang_ets.api.trace import TRACES, Trace, TraceStore
from sglang_ets.api.trace_pages import add_routes
from sglang_ets.core.tree import SearchTree
from sglang_ets.engine.tree_changes import TreeChanges
from tests.api.test_protocol import RESULT, SETTINGS, chat, completion
from tests.api.test_view import HOSTILE, embedded, real

TRACED = {**SETTINGS, "trace": True}


def search_of(name: str = "tree") -> dict[str, Any]:
    """`search` of a recorded answer."""
    found: dict[str, Any] = real(name)["search"]
    return found


def news(part: int, depth: int) -> dict[str, Any]:
    """What the scheduler tells after the level `depth` of the recorded search: that level alone."""
    tree = search_of()["tree"]
    nodes = [node for node in tree["nodes"] if node["depth"] == depth]
    figures = {"algorithm": "ets", "width": 16, "levels": depth, "seconds": float(depth), "rebase_temperature": 0.3}
    return {"part": part, "prompt_tokens": tree["prompt_tokens"], "nodes": nodes, "figures": figures}


def progress(part: int) -> dict[str, Any]:
    return {"progress": {"level": part}, "trace": news(part, part)}


def result(part: int) -> dict[str, Any]:
    """The last report of the recorded search, as the scheduler sends it."""
    choices = real()["choices"]
    answers = [{"text": c["text"], "finish_reason": "stop", "token_ids": [1], **c["search"]} for c in choices]
    end = {**news(part, part), "figures": {**search_of(), "tree": None}}
    return {**RESULT, "results": answers, "search": search_of(), "trace": end}


def sent_by_scheduler(reports: list[dict[str, Any]], **reason: Any) -> AsyncIterator[dict[str, Any]]:
    """As the tokenizer manager hands them out: each time with all earlier ones."""

    async def sent() -> AsyncIterator[dict[str, Any]]:
        for place in range(len(reports)):
            is_last = place == len(reports) - 1
            info = {"id": "a", "search": reports[: place + 1], "finish_reason": (reason or None) if is_last else None}
            yield {"meta_info": info}

    return sent()


def followed(store: TraceStore, reports: list[dict[str, Any]], **reason: Any) -> tuple[Trace, list[int]]:
    """A trace after these reports, and the steps that it showed after each."""

    async def run() -> tuple[Trace, list[int]]:
        trace = store.begin("a", "1+2=", {"algorithm": "ets", "width": 16})
        sizes = []
        async for _ in store.follow(trace, sent_by_scheduler(reports, **reason)):
            sizes.append(len(trace.content()["search"]["tree"]["nodes"]))
        return trace, sizes

    return asyncio.run(run())


def finished(store: TraceStore) -> Trace:
    reports = [progress(depth) for depth in range(1, 6)] + [result(6)]
    return followed(store, reports, type="length", length=3)[0]


# ---- in the scheduler ----


def test_only_what_changed_is_told_and_steps_being_made_wait() -> None:
    tree, changes = SearchTree(5), TreeChanges()
    first, second = tree.add_child(tree.root), tree.add_child(tree.root)
    assert changes.report(tree) == {"part": 1, "prompt_tokens": 5, "nodes": []}
    tree.set_step(first, (1, 2), "a", "step")
    first.score = 0.5
    told = changes.report(tree)
    assert (told["part"], [node["id"] for node in told["nodes"]]) == (2, [first.id])
    assert changes.report(tree)["nodes"] == []
    first.state, first.allocation = "retained", 2
    second.state, second.reason = "failed", "no KV"
    told = changes.report(tree)
    assert [(node["id"], node["state"], node["reason"]) for node in told["nodes"]] == [
        (first.id, "retained", ""),
        (second.id, "failed", "no KV"),
    ]


# ---- the store ----


def test_a_trace_grows_level_by_level_and_ends_as_the_answer() -> None:
    trace, sizes = followed(
        TraceStore(), [progress(depth) for depth in range(1, 6)] + [result(6)], type="length", length=3
    )
    assert sizes == [16, 32, 48, 64, 80, 96]
    assert (trace.state, trace.note, trace.is_live) == ("complete", "", False)
    content = trace.content()
    assert content["search"]["tree"] == search_of()["tree"]
    assert [choice["text"] for choice in content["choices"]] == [choice["text"] for choice in real()["choices"]]


def test_reports_that_came_before_are_passed_over() -> None:
    """sglang repeats them, or sends only the new ones under --incremental-streaming-output."""
    trace = Trace("a", "", {})

    async def run() -> list[int]:
        versions = []
        for reports in ([progress(1)], [progress(1), progress(2)], [progress(1), progress(2)], [progress(3)]):
            trace.add(reports)
            versions.append(trace.version)
        return versions

    assert asyncio.run(run()) == [1, 2, 2, 3]
    assert trace.figures["levels"] == 3


@pytest.mark.parametrize(
    ("reason", "state", "note"),
    [
        ({"type": "abort", "message": "search failed:\nno KV", "status_code": 500}, "failed", "search failed: no KV"),
        ({"type": "abort", "message": "Aborted", "status_code": None}, "failed", "Aborted"),
        ({}, "aborted", "the client went away"),
    ],
)
def test_a_search_without_an_answer_keeps_its_levels_and_says_why(
    reason: dict[str, Any], state: str, note: str
) -> None:
    store = TraceStore()
    trace, _ = followed(store, [progress(1), progress(2)], **reason)
    assert (trace.state, trace.note) == (state, note)
    assert len(trace.content()["search"]["tree"]["nodes"]) == 32
    assert store.get("a") is trace


def test_a_request_that_is_refused_leaves_nothing() -> None:
    store = TraceStore()
    followed(store, [progress(1)], type="abort", message="no room", status_code=400)
    assert store.newest_first() == []

    async def refuse() -> AsyncIterator[dict[str, Any]]:
        raise ValueError("too long")
        yield {}

    async def run() -> None:
        async for _ in store.follow(store.begin("b", "", {}), refuse()):
            pytest.fail("nothing is sent")

    with pytest.raises(ValueError, match="too long"):
        asyncio.run(run())
    assert store.newest_first() == []


def test_only_the_last_that_ended_are_kept_and_running_ones_always() -> None:
    async def run() -> tuple[TraceStore, TraceStore]:
        few, small = TraceStore(max_ended=2), TraceStore(max_ended_bytes=1)
        for store in (few, small):
            running = store.begin("running", "", {})
            assert running.is_live
            for name in "abc":
                trace = store.begin(name, name, {})
                async for _ in store.follow(trace, sent_by_scheduler([progress(1)], type="length")):
                    assert store.get(name) is trace
        return few, small

    few, small = asyncio.run(run())
    assert {trace.id for trace in few.newest_first()} == {"running", "b", "c"}
    assert {trace.id for trace in small.newest_first()} == {"running", "c"}  # the newest stays, however large


def test_an_id_that_comes_again_shows_the_new_search() -> None:
    store = TraceStore()
    old = finished(store)
    new = asyncio.run(_begin(store))
    assert store.get("a") is new and new is not old
    assert store.newest_first() == [new]


async def _begin(store: TraceStore, name: str = "a", title: str = "again") -> Trace:
    return store.begin(name, title, {"algorithm": "ets", "width": 16})


# ---- the routes ----


def client_of(store: TraceStore, **settings: Any) -> TestClient:
    app = FastAPI()
    for _ in range(2):  # every handler of sglang asks for them
        add_routes(app, {"trace": True, **settings}, store)
    return TestClient(app)


def events_in(text: str) -> list[dict[str, Any]]:
    return [json.loads(data) for data in re.findall(r"^data: (.*)$", text, flags=re.MULTILINE)]


def test_page_of_an_ended_search_is_the_page_of_its_answer() -> None:
    store = TraceStore()
    finished(store)
    response = client_of(store).get("/search/a")
    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")
    assert "connect-src" not in response.text
    data = embedded(response.text)
    assert (len(data["nodes"]), len(data["levels"]), data["is_live"], data["title"]) == (96, 6, False, "1+2=")
    assert [answer["answer"] for answer in data["answers"]] == ["38", "173", "193", "163"]
    assert all(answer["node"] is not None for answer in data["answers"])
    assert events_in(client_of(store).get("/search/a/events").text) == [data]


def test_page_of_a_running_search_follows_it_and_may_ask_its_own_server_only() -> None:
    store = TraceStore()
    trace = asyncio.run(_begin(store))
    page = client_of(store).get("/search/a").text
    data = embedded(page)
    assert (data["nodes"], data["is_live"]) == ([], True)
    assert "default-src 'none'" in page and "connect-src 'self'" in page
    asyncio.run(_add(trace, progress(1)))
    data = embedded(client_of(store).get("/search/a").text)
    assert (len(data["nodes"]), data["figures"]["width"]) == (16, 16)
    assert data["rebase_temperature"] == 0.3


async def _add(trace: Trace, *reports: dict[str, Any]) -> None:
    trace.add(reports)


def test_a_watcher_gets_each_level_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_pages, "KEEP_ALIVE_S", 0.02)
    store = TraceStore()

    async def run() -> list[str]:
        trace = store.begin("a", "x", {"algorithm": "ets", "width": 16})
        got: list[str] = []

        async def watch() -> None:
            async for event in trace_pages._events(trace):
                got.append(event)

        watcher = asyncio.create_task(watch())
        reports = [progress(1), progress(2), result(3)]
        async for _ in store.follow(trace, sent_by_scheduler(reports, type="length")):
            size = len(got)
            await asyncio.wait_for(_until(lambda size=size: len(got) > size), 5)
            await asyncio.sleep(0.1)
        await asyncio.wait_for(watcher, 5)
        return got

    got = asyncio.run(run())
    told = events_in("".join(got))
    assert [len(data["nodes"]) for data in told][-1] == 48
    assert [data["is_live"] for data in told] == [True] * (len(told) - 1) + [False]
    assert {len(data["nodes"]) for data in told} >= {16, 32, 48}
    assert ": still running\n\n" in got
    assert all(event.endswith("\n\n") for event in got)


async def _until(is_true: Any) -> None:
    while not is_true():
        await asyncio.sleep(0.005)


def test_the_list_is_json_or_a_page_and_hostile_text_stays_text() -> None:
    store = TraceStore()
    finished(store)
    hostile_id = "<script>/x/../events?#"
    asyncio.run(_begin(store, hostile_id, HOSTILE))
    client = client_of(store)
    rows = client.get("/search").json()["searches"]
    assert [(row["id"], row["state"], row["levels"]) for row in rows] == [
        (hostile_id, "running", 0),
        ("a", "complete", 6),
    ]
    trace = store.get(hostile_id)
    assert trace is not None
    trace.figures["warnings"] = ["2 of 8 steps failed", HOSTILE]
    assert client.get("/search").json()["searches"][0]["note"] == f"2 of 8 steps failed; {HOSTILE}"
    page = client.get("/search", headers={"accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text and "&lt;/script&gt;" in page.text
    links = re.findall(r'href="(/search[^"]*)"', page.text)
    assert len(links) == 2
    shown = client.get(links[0])
    assert shown.status_code == 200
    assert embedded(shown.text)["title"] == HOSTILE
    assert shown.text.count("</script>") == 2


@pytest.mark.parametrize("path", ["/search/none", "/search/none/events", "/search/a/b"])
def test_an_unknown_search_is_a_404_with_one_sentence(path: str) -> None:
    response = client_of(TraceStore()).get(path)
    assert response.status_code == 404
    assert "is known" in response.json()["message"] and "32" in response.json()["message"]


@pytest.mark.parametrize("path", ["/search", "/search/a", "/search/a/events"])
def test_without_the_flag_every_path_names_it(path: str) -> None:
    store = TraceStore()
    finished(store)
    response = client_of(store, trace=False).get(path)
    assert response.status_code == 404
    assert "--search-trace" in response.json()["message"]


# ---- the way of a request ----


class Serving:
    """sglang's handler with a scripted scheduler behind it."""

    def __init__(self, reports: list[dict[str, Any]], reason: dict[str, Any], settings: dict[str, Any]) -> None:
        self.tokenizer_manager = self
        self.server_args = SimpleNamespace(_ets=settings)
        self.context_len = 1000
        self.internal: Any = None
        self.aborted: list[str] = []
        self._sent = sent_by_scheduler(reports, **reason)

    def _validate_request(self, _request: Any) -> None:
        return None

    def _resolve_lora_path(self, *_args: Any) -> None:
        return None

    def _convert_to_internal_request(self, _request: Any, _raw: Any) -> tuple[Any, Any]:
        return SimpleNamespace(sampling_params={}, stream=False, rid=None), None

    def generate_request(self, internal: Any, _raw: Any) -> AsyncIterator[dict[str, Any]]:
        self.internal = internal
        return self._sent

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)

    def create_abort_task(self, _internal: Any) -> None:
        return None


def answered(
    make: Any, reports: list[dict[str, Any]], settings: dict[str, Any], is_gone: bool = False, **reason: Any
) -> tuple[Any, Serving]:
    server = Serving(reports, reason or {"type": "length"}, settings)

    async def is_disconnected() -> bool:
        return is_gone

    raw = SimpleNamespace(is_disconnected=is_disconnected)
    return asyncio.run(answer(server, make(), raw)), server


@pytest.mark.parametrize("make", [completion, chat])
def test_a_body_is_the_same_with_and_without_tracing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TRACES", store := TraceStore())
    plain, untraced = answered(make, [{**result(1), "trace": None}], SETTINGS)
    traced, server = answered(make, [progress(1), progress(2), result(3)], TRACED)
    assert {**json.loads(plain.body), "created": 0} == {**json.loads(traced.body), "created": 0}
    assert (untraced.internal.stream, untraced.internal.rid) == (False, None)
    assert server.internal.stream and server.internal.sampling_params["custom_params"]["ets_trace"] is True
    assert untraced.internal.sampling_params["custom_params"]["ets_trace"] is False
    kept = store.newest_first()
    assert [(trace.id, trace.title, trace.state) for trace in kept] == [(server.internal.rid, "1+2=", "complete")]


def test_failures_are_the_same_with_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TRACES", store := TraceStore())
    abort = {"type": "abort", "message": "search failed: no KV", "status_code": 500}
    failed, _ = answered(completion, [progress(1), progress(2)], TRACED, **abort)
    assert (failed.status_code, json.loads(failed.body)["message"]) == (500, "search failed: no KV")
    refused, _ = answered(completion, [{}], TRACED, **{**abort, "message": "too long", "status_code": 400})
    assert (refused.status_code, json.loads(refused.body)["message"]) == (400, "too long")
    assert [trace.state for trace in store.newest_first()] == ["failed"]


def test_a_client_that_goes_away_aborts_its_traced_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TRACES", TraceStore())
    gone, server = answered(completion, [progress(1), result(2)], TRACED, is_gone=True)
    assert gone.status_code == 400
    assert server.aborted == ["a"]


def test_a_scheduler_that_stops_telling_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TRACES", TraceStore())
    server = Serving([progress(1)], {}, TRACED)

    async def is_disconnected() -> bool:
        return False

    response = asyncio.run(answer(server, completion(), SimpleNamespace(is_disconnected=is_disconnected)))
    assert response.status_code == 500
    assert TRACES.newest_first() == []
