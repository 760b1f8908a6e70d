"""Data sets: what a record becomes, the two splits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.datasets import DATA_ENV, load, split_of


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_gsm8k_answer_is_the_number_at_its_end(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm8k_test.jsonl", {"question": "How many?", "answer": "1+1=2\n#### 1,200"})
    (problem,) = load(str(file), split="all")
    assert (problem.answer, problem.answer_pattern) == ("1200", "boxed")
    assert problem.prompt.endswith("How many?")
    assert "\\boxed{}" in problem.prompt


def test_the_data_folder_is_looked_into_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "math500_test.jsonl", {"problem": "x?", "answer": r"\frac12", "unique_id": "one"})
    monkeypatch.setenv(DATA_ENV, str(tmp_path))
    (problem,) = load("math500", split="all")
    assert (problem.id, problem.question, problem.answer) == ("one", "x?", r"\frac12")


def test_splits_are_disjoint_and_together_everything() -> None:
    validation, test, everything = (
        [problem.question for problem in load("embedded", split=split)]  # type: ignore[arg-type]
        for split in ("validation", "test", "all")
    )
    assert not set(validation) & set(test)
    assert sorted(validation + test) == sorted(everything)
    assert 0.1 < len(validation) / len(everything) < 0.3
    assert {split_of(question) for question in validation} == {"validation"}
    assert [problem.question for problem in load("embedded", limit=3)] == test[:3]


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
        load(str(write(tmp_path / "gsm8k.jsonl", record)), split="all")


def test_a_wrong_set_split_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a data set must be one of embedded, gsm8k"):
        load("nothing")
    with pytest.raises(ValueError, match="split must be one of validation, test, all"):
        load("embedded", split="train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load("embedded", limit=0)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(str(tmp_path / "missing.jsonl"))
