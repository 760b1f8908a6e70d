"""Data sets: what a record becomes, what is left for validation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_ets.tools.datasets import DATA_ENV, load, split_of

HALF = r"\frac12"


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_gsm8k_answer_is_the_number_at_its_end(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm8k_test.jsonl", {"question": "How many?", "answer": "1+1=2\n#### 1,200"})
    (problem,) = load(str(file))
    assert problem.answer == "1200"
    assert problem.prompt.endswith("How many?") and "\\boxed{}" in problem.prompt


def test_the_data_folder_is_looked_into_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "math500_test.jsonl", {"problem": "x?", "answer": HALF, "unique_id": "one"})
    monkeypatch.setenv(DATA_ENV, str(tmp_path))
    (problem,) = load("math500")
    assert (problem.id, problem.question, problem.answer) == ("one", "x?", HALF)


def test_a_share_of_the_problems_is_left_for_validation(tmp_path: Path) -> None:
    questions = [f"question {number}" for number in range(100)]
    file = write(tmp_path / "set.jsonl", *({"question": question, "answer": "1"} for question in questions))
    loaded = [problem.question for problem in load(str(file))]
    assert loaded == [question for question in questions if split_of(question) == "report"]
    assert 70 < len(loaded) < 90
    assert [problem.question for problem in load(str(file), limit=3)] == loaded[:3]
    left = [problem.question for problem in load(str(file), split="validation")]
    assert sorted([*loaded, *left]) == sorted(questions)
    assert [problem.question for problem in load(str(file), split="all")] == questions


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "x"}, "must have one of the fields answer"),
        ([1], "must be a JSON object, got list"),
        ({"question": "x", "answer": "first\nsecond"}, "must end in '#### number'"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(str(write(tmp_path / "gsm8k.jsonl", record)))


def test_a_wrong_set_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a data set must be one of gsm8k, math500"):
        load("nothing")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load("gsm8k", limit=0)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(str(tmp_path / "missing.jsonl"))


def test_a_story_stays_with_its_question(tmp_path: Path) -> None:
    record = {"body": "Ann has 3 apples.", "question": "How many has she?", "answer": ["3 (apples)"], "id": "asdiv-1"}
    (problem,) = load(str(write(tmp_path / "set.jsonl", record)))
    assert (problem.question, problem.answer) == ("Ann has 3 apples. How many has she?", "3 (apples)")


def test_lines_end_at_line_feeds_and_a_byte_order_mark_is_none_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    texts = [json.dumps({"question": f"{n}a\u2028b\x85c", "answer": n}, ensure_ascii=False) for n in range(3)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode() + b"\n\n")
    loaded = load(str(file))
    expected = [f"{n}a\u2028b\x85c" for n in range(3) if split_of(f"{n}a\u2028b\x85c") == "report"]
    assert [problem.question for problem in loaded] == expected and expected


@pytest.mark.parametrize("answer", [["1", "2"], {"value": 1}, True])
def test_an_answer_of_several_values_is_refused(tmp_path: Path, answer: Any) -> None:
    with pytest.raises(ValueError, match="answer must be one text or number, got"):
        load(str(write(tmp_path / "set.jsonl", {"question": "x", "answer": answer})))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('{"question": "x", "answer": 1}\n{"question": \n')
    with pytest.raises(ValueError, match="line 2, must be a JSON object"):
        load(str(file))
