"""Every bench of `make bench` in its smoke mode: whole where it needs no server, else up to the start of its server."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import demo, kernels, readme, rows, server

ROOT = Path(__file__).parents[2]
BENCHES = re.findall(r"^BENCHES := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[0].split()
SERVERLESS = {"ilp": 20, "kernels": 6, "attention": 2}  # and the rows of their smoke mode


class ServerStarts(Exception):
    """Instead of a server."""


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise ServerStarts

    monkeypatch.setattr(server, "_free_port", refuse)


@pytest.mark.parametrize("bench", BENCHES)
def test_a_smoke_runs_as_far_as_its_server(
    bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", [f"bench/{bench}.py", "--smoke", "--out", str(out)])
    main = import_module(f"bench.{bench}").main
    if bench not in SERVERLESS:
        with pytest.raises(ServerStarts):
            main()
        return
    main()
    assert len(list(rows.read(out))) == SERVERLESS[bench]
    assert list(rows.runs(out)) == [1]
    assert "|---|" in capsys.readouterr().out


def test_the_demo_asks_its_server_for_each_problem_by_each_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(demo, "running_server", lambda *_args, **_options: nullcontext("http://127.0.0.1:1"))
    monkeypatch.setattr(demo.run, "main", lambda flags: asked.append(demo.run.parser().parse_args(flags)))
    monkeypatch.setattr(sys, "argv", ["demo", "--problems", "2", "--width", "4"])
    demo.main()
    ways = [(way.width, json.loads(way.search)["algorithm"]) for way, _ in demo.run.jobs_of(asked[0])]
    assert ways == [(4, policy) for policy in demo.POLICIES] * 2
    assert asked[0].base_url == "http://127.0.0.1:1"
    assert "make serve" in capsys.readouterr().out


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_benches_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(r"make bench-([\w.]+\w)", page.read_text(encoding="utf-8").replace("make bench-NAME", "")):
        assert (ROOT / "bench" / Path(*name.split("."))).with_suffix(".py").exists(), name


def test_kernel_rows_have_a_time_and_the_bytes_of_each_implementation() -> None:
    case = next(kernels.cases(smoke=True))
    timed = list(kernels.measure(case, torch.device("cpu"), smoke=True))
    assert [row["implementation"] for row in timed] == ["reference", case.plain_name]
    for row in timed:
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["requested_bytes"] >= row["lower_bound_bytes"] > 0
