"""`sglang-ets top`: two looks at a scripted server, and what it says when there is none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rich.console import Console

from sglang_ets.tools import top
from sglang_ets.tools.top import Sample, main, totals, view

METRICS = """\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{tp_rank="0"} 3.0
# TYPE sglang_ets_generated_tokens_total counter
sglang_ets_generated_tokens_total{algorithm="ets"} 100.0
sglang_ets_generated_tokens_total{algorithm="rebase"} 20.0
# TYPE sglang_ets_score_seconds histogram
sglang_ets_score_seconds_bucket{le="+Inf"} 4.0
sglang_ets_score_seconds_sum 2.0
sglang_ets_score_seconds_count 4.0
"""


def rank(*searches: dict[str, Any], held: int = 0) -> dict[str, Any]:
    counts = {"running": len(searches), "suspended": 0, "waiting": 2, "steps_in_engine": 9, "done": 5, "failed": 1}
    return {
        **counts,
        "searches": list(searches),
        "held_kv_tokens": held,
        "prm": {"held_kv_tokens": 5, "pool_tokens": 50},
    }


def search(name: str, seconds: float) -> dict[str, Any]:
    figures = {"width": 16, "levels": 3, "nodes_made": 48, "held_kv_tokens": 30, "seconds": seconds}
    return {"id": name, "algorithm": "ets", **figures}


def shown(now: Sample, before: Sample | None) -> str:
    console = Console(width=160, record=True)
    console.print(view(now, before))
    return console.export_text()


def test_totals_are_sums_over_labels() -> None:
    assert totals(METRICS) == {"sglang:num_running_reqs": 3.0, "sglang_ets_generated_tokens": 120.0}


def test_rates_are_differences_and_pools_are_shares() -> None:
    before = Sample(10.0, 100, (rank(),), {"sglang_ets_generated_tokens": 20.0, "sglang:num_running_reqs": 1.0})
    now = Sample(12.0, 100, (rank(search("young", 1.0), search("old", 9.0), held=40),), totals(METRICS))
    text = shown(now, before)
    assert "2 running  0 suspended  2 waiting  9 steps in engine  5 done  1 failed" in text
    assert "40 of 100 tokens held by searches (40%)" in text and "5 of 50 tokens held by searches (10%)" in text
    assert "3 requests running" in text and "50 tokens/s of searches" in text
    assert text.index("old") < text.index("young")
    assert "--enable-metrics" in shown(Sample(1.0, 100, (rank(),), None), None)


class Handler(BaseHTTPRequestHandler):
    info: Any = None

    def do_GET(self) -> None:
        body = json.dumps(self.info).encode() if self.path == "/server_info" else b""
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_one_look_at_a_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Handler.info = {"max_total_num_tokens": 100, "internal_states": [{"search": rank(search("only", 2.5))}]}
    main(["--once", "--base-url", f"{url}/v1"])
    out = capsys.readouterr().out
    assert "1 searches, oldest first" in out and "only" in out and "--enable-metrics" in out


def test_no_server_and_one_without_search_are_one_sentence(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Handler.info = {"internal_states": [{}]}
    for address, message in ((url, "has no search; start it with"), ("http://127.0.0.1:9", "no server answers at")):
        with pytest.raises(SystemExit) as left:
            main(["--once", "--base-url", address])
        assert left.value.code == top.EXIT_FAILED
        assert message in capsys.readouterr().err
