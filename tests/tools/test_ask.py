"""`sglang-ets ask` against a small server that speaks the chunks of a search."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from rich.console import Console

from sglang_ets.api.view import read_view
from sglang_ets.launch_server import EMBEDDED
from sglang_ets.tools import ask
from sglang_ets.tools.ask import AskFailed, Question, Watched, live_view, parse_settings, watch

PROGRESS = {"level": 1, "retained": 2, "complete": 0, "best_score": 0.75, "kv_held_tokens": 42}
TREE_NODE = {"id": 1, "parent": 0, "depth": 1, "text": "1+2=3", "token_ids": [1, 2], "finish": "stop", "score": 0.9}
TREE = {
    "prompt_tokens": 3,
    "nodes": [{**TREE_NODE, "allocation": 0, "cluster": None, "state": "complete", "reason": ""}],
}
FIGURES = {
    "algorithm": "ets",
    "width": 4,
    "levels": 2,
    "nodes_made": 8,
    "nodes_pruned": 3,
    "kv_tokens_peak": 77,
    "seconds": 1.5,
    "finish_reason": "complete",
    "tree": TREE,
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}


def details(answer: str | None, score: float) -> dict[str, Any]:
    return {"score": score, "step_scores": [score], "answer": answer, "votes": score}


def chunk(text: str, *, index: int = 0, is_chat: bool = False, end: Any = None, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"delta": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    ends = {"finish_reason": "stop", "search": end} if end else {"finish_reason": None}
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    head = {"id": "a", "object": kind, "created": 1, "model": "default"}
    return {**head, "choices": [{"index": index, **body, **ends}], **fields}


def searched(is_chat: bool) -> list[dict[str, Any]]:
    """A search of two levels with two answers, one of them with what looks like markup."""
    told = [{"progress": {**PROGRESS, "level": level}} for level in (1, 2)]
    return [
        chunk("1+", is_chat=is_chat, search=told[0]),
        chunk("", is_chat=is_chat, search=told[1]),
        chunk("2=3", is_chat=is_chat),
        chunk("", is_chat=is_chat, end=details("3", 0.9)),
        chunk("[red]4[/]", index=1, is_chat=is_chat),
        chunk("", index=1, is_chat=is_chat, end=details(None, 0.1), search=FIGURES),
        {**chunk("", is_chat=is_chat), "choices": [], "usage": USAGE},
    ]


class Fake(ThreadingHTTPServer):
    """Answers every request with `status` and `chunks`, and keeps what it was sent."""

    def __init__(self, chunks: list[dict[str, Any]], status: int, model: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.chunks, self.status, self.model = chunks, status, model
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        """The list of models."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"object": "list", "data": [{"id": self.server.model}]}).encode())

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        is_stream = self.server.status == 200
        self.send_header("Content-Type", "text/event-stream" if is_stream else "application/json")
        self.end_headers()
        if is_stream:
            events = [f"data: {json.dumps(one)}\n\n" for one in self.server.chunks]
            self.wfile.write("".join([*events, "data: [DONE]\n\n"]).encode())
        else:
            self.wfile.write(json.dumps(self.server.chunks[0]).encode())

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@contextmanager
def serving(chunks: list[dict[str, Any]], status: int = 200, model: str = "a-model") -> Iterator[tuple[Fake, str]]:
    server = Fake(chunks, status, model)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_stream_becomes_levels_answers_and_figures(is_chat: bool) -> None:
    with serving(searched(is_chat)) as (server, url):
        texts = []
        watched = Watched()
        for watched in watch(client_of(url), Question("1+2=", 4, is_chat, settings={"algorithm": "ets"}, seed=7)):
            texts.append(watched.final_text)
    assert texts[:3] == ["1+", "1+", "1+2=3"]
    assert [progress["level"] for progress in watched.progress] == [1, 2]
    assert watched.choices[0]["search"]["answer"] == "3" and watched.choices[0]["finish_reason"] == "stop"
    assert watched.figures == FIGURES
    assert watched.usage is not None and watched.usage["completion_tokens"] == 20
    (sent,) = server.bodies
    assert server.paths == ["/v1/chat/completions" if is_chat else "/v1/completions"]
    assert (sent["search_width"], sent["search"], sent["seed"], sent["stream"]) == (4, {"algorithm": "ets"}, 7, True)
    assert sent.get("prompt") == (None if is_chat else "1+2=")
    assert "max_tokens" not in sent


def test_command_prints_levels_answers_and_saves_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "tree.json"
    with serving(searched(False)) as (server, url):
        ask.main(
            ["1+2=", "--width", "2", "--base-url", f"{url}/v1/", "--tree", str(saved), "--set", "kv_cost_weight=2"]
        )
    out = capsys.readouterr().out
    assert "level  1     2 retained     0 complete  best score 0.750  KV held     42 tokens" in out
    assert "ets width 4: 2 levels, 8 steps (3 pruned), KV peak 77 tokens, 20 tokens generated, 1.50 s, complete" in out
    assert "[red]4[/]" in out  # a model's brackets are no markup
    assert server.bodies[0]["search"] == {"kv_cost_weight": 2, "return_tree": True}
    assert server.bodies[0]["n"] == 2
    found = read_view(json.loads(saved.read_text(encoding="utf-8")), "")
    assert [(answer.answer, answer.node) for answer in found.answers] == [("3", 1), ("-", None)]


@pytest.mark.parametrize("warnings", [[], ["2 of 8 steps failed: [red]no memory[/]", "the deadline passed"]])
def test_what_makes_the_answer_less_is_shown(warnings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    chunks = searched(False)
    chunks[-2]["search"] = {**FIGURES, "warnings": warnings}
    with serving(chunks) as (_, url):
        ask.main(["1+2=", "--base-url", url])
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert lines == [f"warning: {text}" for text in warnings]


@pytest.mark.parametrize(
    ("model", "given", "sent"),
    [
        (EMBEDDED["--served-model-name"], "1+2=", "1+2=\n"),
        (EMBEDDED["--served-model-name"], "1+2=\n", "1+2=\n"),
        ("a-model", "1+2=", "1+2="),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--chat"]])
def test_the_embedded_models_get_the_newline_they_were_trained_with(
    model: str, given: str, sent: str, flags: list[str]
) -> None:
    with serving(searched(bool(flags)), model=model) as (server, url):
        ask.main([given, "--base-url", url, *flags])
    (body,) = server.bodies
    assert body.get("prompt") == (None if flags else sent)
    assert body.get("messages") == ([{"role": "user", "content": sent}] if flags else None)


def test_a_problem_that_looks_like_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ask.main(["-3+4=", "--width", "2"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip().endswith('behind --, as in: sglang-ets ask -- "-3+4="')
    with serving(searched(False)) as (server, url):
        ask.main(["--base-url", url, "--", "-3+4="])
    assert server.bodies[0]["prompt"] == "-3+4="


def test_live_display_shows_levels_and_final_text() -> None:
    watched = Watched({0: {"index": 0, "text": "[bold]so", "finish_reason": None}}, [PROGRESS])
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(live_view(Watched()))
    console.print(live_view(watched))
    shown = console.export_text()
    assert "waiting for the first level" in shown
    assert "KV held     42 tokens" in shown and "[bold]so" in shown


REFUSAL = {"object": "error", "message": "search_width must be an integer, got 0; leave it out", "type": "BadRequest"}


@pytest.mark.parametrize(
    ("chunks", "status", "message"),
    [
        ([REFUSAL], 400, "search_width must be an integer, got 0; leave it out"),
        ([searched(False)[0], {"error": {"message": "no KV", "type": "SearchFailed", "code": 500}}], 200, "no KV"),
        ([chunk("3")], 200, "answered without a search; start it with `sglang-ets serve`"),
    ],
    ids=["refused", "failed on the way", "stock server"],
)
def test_no_answer_is_one_sentence(
    chunks: list[dict[str, Any]], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(chunks, status) as (_, url), pytest.raises(SystemExit) as caught:
        ask.main(["1+2=", "--base-url", url])
    assert caught.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("sglang-ets ask: ") and said.endswith(message) and "\n" not in said


def test_a_width_of_one_is_no_search(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ask.main(["1+2=", "--width", "1"])
    assert caught.value.code == 2
    assert "--width must be at least 2, got 1" in capsys.readouterr().err


def test_no_server_is_one_sentence() -> None:
    with serving([]) as (_, url):
        pass  # now nobody listens there
    with pytest.raises(AskFailed, match=r"no server answers at http://127.0.0.1:\d+ .*sglang-ets serve"):
        list(watch(client_of(url), Question("x")))


def test_settings_are_json_or_text() -> None:
    assert parse_settings(["a=2", "b=true", "c=dvts", "d=x=y", 'e="5"']) == {
        "a": 2,
        "b": True,
        "c": "dvts",
        "d": "x=y",
        "e": "5",
    }


@pytest.mark.parametrize("pair", ["a", "=1"])
def test_a_setting_needs_a_name_and_a_value(pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ask.main(["x", "--set", pair])
    assert caught.value.code == 2
    assert "--set needs NAME=VALUE" in capsys.readouterr().err
