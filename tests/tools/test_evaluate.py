"""Tables from saved trees: every way to choose, against answers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_ets.tools import evaluate as module
from sglang_ets.tools.evaluate import Cell, evaluate, main, solved_in

# answer and step scores of the complete trajectories of one problem, whose answer is 1
FINISHED = [("1", [0.2, 0.9]), ("2", [0.8, 0.8]), ("2", [0.7, 0.7]), ("1", [0.3, 0.85])]


def row(name: str = "a") -> dict[str, Any]:
    nodes = []
    for answer, scores in FINISHED:
        first = len(nodes) + 1
        nodes.append({"id": first, "parent": 0, "score": scores[0], "text": "so\n", "state": "retained"})
        text = f"\\boxed{{{answer}}}"
        nodes.append({"id": first + 1, "parent": first, "score": scores[1], "text": text, "state": "complete"})
    figures = {"algorithm": "ets", "tree": {"nodes": nodes}}
    return {"data": "sums", "width": 4, "search": "{}", "expected": "1", "problem": name, "search_result": figures}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps(row(name)) + "\n" for name in "abc"))
    return file


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    made = [{"text": f"What is it?\nso\n\\boxed{{{answer}}}", "step_scores": scores} for answer, scores in FINISHED]
    one = {"id": 0, "question": "What is it?", "model_answer": made, "ground_truth_answer": "1", "total_tokens": 5}
    folder = tmp_path / "ets_4_sums"
    folder.mkdir()
    (folder / "answers.json").write_text(json.dumps([one]))
    return folder / "answers.json"


# is the answer right with all four trajectories? by the rule, then by the score of a trajectory
EXPECTED = {
    ("best", "last"): True,  # 0.9
    ("best", "mean"): False,  # 0.8 against 0.575
    ("best", "prod"): False,
    ("best", "min"): False,
    ("majority", "last"): True,  # two against two: by summed score, 1.75 against 1.5
    ("weighted_majority", "last"): True,
    ("weighted_majority", "mean"): False,
    ("weighted_majority", "min"): False,
}


@pytest.mark.parametrize("kind", ["rows", "answers"])
def test_every_way_to_choose(kind: str, request: pytest.FixtureRequest) -> None:
    problems = list(solved_in(request.getfixturevalue(kind)))
    cells = evaluate(problems, "boxed", [])
    count = len(problems)
    name = problems[0].name
    assert sorted({n for _, n, _, _ in cells}) == [1, 2, 4]
    for (rule, aggregation), is_right in EXPECTED.items():
        assert cells[name, 4, aggregation, rule] == Cell(count * is_right, count * is_right, count)  # type: ignore[index]
    for rule in ("best", "majority", "weighted_majority"):
        assert cells[name, 1, "last", rule].right == count, "the first trajectory alone is right"  # type: ignore[index]


def test_values_may_be_written_in_two_ways(tmp_path: Path) -> None:
    half = row()
    half["expected"] = r"\frac{1}{2}"
    for node in half["search_result"]["tree"]["nodes"]:
        node["text"] = node["text"].replace("{1}", "{0.5}").replace("{2}", "{0.5}")
    (tmp_path / "run.jsonl").write_text(json.dumps(half) + "\n")
    (cell,) = set(evaluate(list(solved_in(tmp_path / "run.jsonl")), "boxed", [4]).values())
    assert (cell.right, cell.strictly) == (1, 0)


def test_the_command_prints_tables_and_draws(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plot.png"
    main([str(rows), "--n", "4", "--plot", str(picture)])
    out = capsys.readouterr().out
    assert "sums, ets width 4 {}, 3 problems" in out
    assert "1.000 [0.439, 1.000]" in out and "0.000 [0.000, 0.561]" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_pattern_that_finds_nothing_is_said(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(rows), "--answer-pattern", "the_answer_is"])
    assert "--answer-pattern the_answer_is finds no answer in any trajectory; give" in capsys.readouterr().err
    main([str(rows)])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{}", "must be rows of `sglang-ets run`"),
        ("x.jsonl", '{"a": 1}\n', "must hold rows of `sglang-ets run`, got fields a"),
        ("x.jsonl", "", "must hold solved problems, got none"),
    ],
)
def test_other_files_are_refused(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / name)])
    assert left.value.code == module.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
