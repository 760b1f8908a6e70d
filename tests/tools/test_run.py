"""A run: what is asked and written, that it goes on where it stopped, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from rich.console import Console

from sglang_ets.tools import run
from sglang_ets.tools.datasets import Problem
from sglang_ets.tools.run import Asked, jobs_of, key_of, parser, problems_of, rows_in, table_of
from tests.tools.test_ask import serving

PROBLEMS = [Problem(str(number), f"{number}+{number}=", str(2 * number)) for number in range(4)]


class Server:
    """Answers that the sum is what the problem's number says, all but one of them right."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.fails_at = fails_at
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._chat))
        self.completions = SimpleNamespace(create=self._complete)

    def _chat(self, messages: Any, **body: Any) -> Any:
        text = messages[0]["content"].splitlines()[-1]
        return self._answer(text, body, lambda words: {"message": SimpleNamespace(content=words)})

    def _complete(self, prompt: str, **body: Any) -> Any:
        assert prompt.endswith("\n")
        return self._answer(prompt.strip(), body, lambda words: {"text": words})

    def _answer(self, question: str, body: dict[str, Any], shape: Callable[[str], dict[str, Any]]) -> Any:
        self.asked.append(body)
        number = question.split("+")[0]
        if number == self.fails_at:
            raise openai.APIConnectionError(request=httpx.Request("POST", "http://x"))
        answer = "0" if number == "3" else str(2 * int(number))
        choice = SimpleNamespace(search={"answer": answer}, **shape(f"The answer is {answer}"))
        figures = {"algorithm": "ets", "kv_tokens_mean": 10.0 * int(number), "tree": {"nodes": []}}
        usage = SimpleNamespace(model_dump=lambda: {"completion_tokens": 7})
        return SimpleNamespace(choices=[choice], search=figures, usage=usage)


def asked(**fields: Any) -> Asked:
    given: dict[str, Any] = {
        "data": "sums",
        "width": 4,
        "search": "{}",
        "temperature": None,
        "seed": 0,
        "max_tokens": None,
    }
    return Asked(**{**given, **fields})


def solved(server: Server, out: Path, ways: list[Asked]) -> list[tuple[int, int]]:
    jobs = [(way, problem) for problem in PROBLEMS for way in ways]
    return list(run.run(server, jobs, out, in_flight=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_chat", [True, False])
def test_rows_hold_what_was_asked_and_what_came_of_it(tmp_path: Path, is_chat: bool) -> None:
    server, out = Server(), tmp_path / "run.jsonl"
    way = asked(search='{"algorithm": "ets"}', temperature=0.5, max_tokens=99, is_chat=is_chat)
    assert solved(server, out, [way]) == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert server.asked[0] == {
        "model": "default", "seed": 0, "temperature": 0.5, "max_tokens": 99,
        "extra_body": {"search_width": 4, "search": {"algorithm": "ets", "return_tree": True}},
    }  # fmt: skip
    rows = list(rows_in(out))
    assert [(row["problem"], row["answer"], row["is_right"]) for row in rows] == [
        ("0", "0", True), ("1", "2", True), ("2", "4", True), ("3", "0", False),
    ]  # fmt: skip
    assert "tree" in rows[0]["search_result"]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, ways = tmp_path / "run.jsonl", [asked(), asked(width=8)]
    with pytest.raises(openai.APIConnectionError):
        solved(Server(fails_at="2"), out, ways)
    before = out.read_text()
    assert 1 <= len(before.splitlines()) < 8
    out.write_text(before + '{"data": "su')  # a line that was being written when the power went
    server = Server()
    solved(server, out, ways)
    assert len(server.asked) == 8 - len(before.splitlines())
    keys = [key_of(row) for row in rows_in(out)]
    assert len(keys) == len(set(keys)) == 8
    assert solved(Server(), out, ways) == [(0, 0)]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    out.write_text('{"data": \n{"data": "sums"}\n')
    with pytest.raises(ValueError, match="line 1, must be a JSON object"):
        list(rows_in(out))


def test_the_table_has_a_line_for_each_way_to_ask(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    solved(Server(), out, [asked(), asked(width=8)])
    console = Console(width=200, record=True)
    console.print(table_of(list(rows_in(out))))
    lines = [line for line in console.export_text().splitlines() if "sums" in line]
    assert len(lines) == 2
    assert all("0.750" in line and " 15 " in line for line in lines)


def test_the_table_stands_in_the_order_asked_for_not_in_that_of_answers(tmp_path: Path) -> None:
    out, narrow, wide = tmp_path / "run.jsonl", asked(), asked(width=8)
    solved(Server(), out, [narrow, wide])
    rows = sorted(rows_in(out), key=lambda row: -row["width"])
    order = lambda *ways: [str(cell) for cell in table_of(rows, ways).columns[1].cells]  # noqa: E731
    assert order(narrow, wide) == ["4", "8"]
    assert order(narrow) == ["4", "8"], "what an earlier run asked for comes after"
    assert order() == ["8", "4"]


def test_jobs_take_all_ways_before_the_next_problem() -> None:
    args = parser().parse_args(
        [
            "--data",
            "embedded",
            "--limit",
            "2",
            "--width",
            "4",
            "8",
            "--algorithm",
            "ets",
            "rebase",
            "--set",
            "preset=paper",
        ]
    )
    jobs = jobs_of(args)
    assert [problem.id for _, problem in jobs] == ["0"] * 4 + ["1"] * 4
    assert [(way.width, json.loads(way.search)) for way, _ in jobs[:4]] == [
        (width, {"algorithm": name, "preset": "paper"}) for width in (4, 8) for name in ("ets", "rebase")
    ]
    assert not jobs[0][0].is_chat and problems_of("embedded", 1, "report")[0].question.endswith("\n")


def test_a_split_can_be_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps({"question": f"q {n}", "answer": "1"}) + "\n" for n in range(20)))
    count = {
        split: len(jobs_of(parser().parse_args(["--data", str(file), "--split", split])))
        for split in ("report", "validation", "all")
    }
    assert count["all"] == 20 == count["report"] + count["validation"] and count["validation"] > 0


def test_a_server_that_does_not_search_is_named(tmp_path: Path) -> None:
    server = Server()
    server.chat.completions.create = lambda **_: SimpleNamespace(
        choices=[SimpleNamespace(message=SimpleNamespace(content="2"))]
    )
    with pytest.raises(ValueError, match="answered without a search; start it with `sglang-ets serve`"):
        solved(server, tmp_path / "run.jsonl", [asked()])


def test_a_refusal_is_the_sentence_of_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = {"object": "error", "message": "kv must be so, got 1; drop it"}
    with serving([refused], 400) as (_, url), pytest.raises(SystemExit):
        run.main(["--data", "embedded", "--limit", "1", "--base-url", url, "--out", str(tmp_path / "r.jsonl")])
    said = capsys.readouterr().err
    assert said.startswith("sglang-ets run: kv must be so, got 1; drop it; what is done is in ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "nothing"], "got 'nothing'; `sglang-ets run` knows embedded too"),
        (["--data", "embedded", "--width", "4", "1"], "--width must be at least 2, got 1; a request of width 1"),
        (["--data", "embedded", "--set", "x"], "--set needs NAME=VALUE"),
        (
            ["--data", "embedded", "--limit", "1", "--base-url", "http://127.0.0.1:9"],
            "no server answers at http://127.0.0.1:9",
        ),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main([*argv, "--out", str(tmp_path / "run.jsonl")])
    assert message in capsys.readouterr().err
