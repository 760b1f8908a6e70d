"""Problems of a data set for a real model, one record each: `load("gsm8k", limit=100)`.

A set is a name (`gsm8k`, `math500`), a JSONL file, or owner/name on the Hub. For a name, a file that begins with it
(`gsm8k_test.jsonl`) is looked for in the folder that SGLANG_ETS_DATA names; without one the Hub is asked through the `datasets`
package. A fifth of each set, by a hash of the question's text, is left for choosing settings on: it is loaded only on request,
alone or with the others.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

DATA_ENV = "SGLANG_ETS_DATA"
ON_HUB = {"gsm8k": ("openai/gsm8k", "main"), "math500": ("HuggingFaceH4/MATH-500", None)}
EMBEDDED_PROBLEMS = Path(__file__).parents[1] / "models" / "problems.jsonl"  # of the embedded task, held out
VALIDATION_SHARE = 5  # one of so many
QUESTION_KEYS = ("question", "problem", "prompt", "Question")
ANSWER_KEYS = ("answer", "expected_answer", "Answer")
BODY_KEYS = ("body", "Body")
ID_KEYS = ("unique_id", "id", "ID")
_FINAL = re.compile(r"####\s*(.+)\s*\Z")
_IDENTIFIER_CHARS = 10

Split = Literal["report", "validation", "all"]
SPLITS = get_args(Split)

# Two demands a step's form makes on the model: where a step ends (a blank line) and where the answer stands.
TEMPLATE = (
    "Solve the following math problem step by step. Separate the steps by blank lines, and put the final answer within "
    "\\boxed{{}} at the end.\n\n{question}"
)


@dataclass(frozen=True)
class Problem:
    """One question and its answer: a number for GSM8K, LaTeX for others."""

    id: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """A user's turn; the answer is asked for in a box."""
        return TEMPLATE.format(question=self.question)


def load(name_or_path: str, limit: int | None = None, split: Split = "report") -> list[Problem]:
    """The first `limit` problems of a split in the set's order, all if None.

    `report`: those to report on; `validation`: those left for choosing settings on; `all`: both.

    Raises:
        ValueError: the limit is wrong, the set is unknown, or a record lacks its question or answer.
        FileNotFoundError: a path that does not exist.
        ModuleNotFoundError: the Hub is needed, and the `datasets` package is not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out for all problems")
    records, where = _open(name_or_path)
    is_gsm8k = "gsm8k" in where.lower()
    problems: list[Problem] = []
    for number, record in enumerate(records, 1):
        problem = _problem(record, is_gsm8k, f"{where}, record {number}")
        if split == "all" or split == split_of(problem.question):
            problems.append(problem)
        if len(problems) == limit:
            break
    return problems


def split_of(question: str) -> Split:
    """A property of the text alone, whatever the file's order."""
    return "report" if zlib.crc32(question.strip().encode()) % VALIDATION_SHARE else "validation"


def _open(name_or_path: str) -> tuple[Iterable[Mapping[str, Any]], str]:
    """Records and a name for messages: a set's own name first, then a path, then a name on the Hub."""
    if name_or_path in ON_HUB:
        path = _in_data_folder(name_or_path)
        return (_jsonl(path), path.name) if path else (_hub(*ON_HUB[name_or_path]), ON_HUB[name_or_path][0])
    path = Path(name_or_path)
    if path.exists() or path.suffix in (".jsonl", ".json"):
        return _jsonl(path), path.name
    if name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")):
        return _hub(name_or_path, None), name_or_path
    raise ValueError(
        f"a data set must be one of {', '.join(ON_HUB)}, a JSONL file or owner/name on the Hub, got {name_or_path!r}; "
        "`sglang-ets run` knows embedded too"
    )


def _in_data_folder(name: str) -> Path | None:
    folder = os.environ.get(DATA_ENV)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{DATA_ENV} must name a folder of JSONL files, got {folder!r}; create it or unset it")
    return next(iter(sorted(Path(folder).glob(f"{name}*.jsonl"))), None)


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a JSONL file with one problem a line; there is no such file")
    # A line of JSON ends at a line feed alone: texts may hold other separators. A byte order mark is no part of the first one.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path.name}, line {number}, must be a JSON object, got {line[:60]!r} ({error})"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}, line {number}, must be a JSON object, got {type(record).__name__}")
        yield record


def _hub(name: str, config: str | None) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]  # heavy, and only the Hub needs it
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{name} is fetched with the `datasets` package, which is not installed; install it, or give a JSONL file "
            f"by path or in the folder that {DATA_ENV} names"
        ) from None
    loaded: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, config, split="test")
    return loaded


def _problem(record: Mapping[str, Any], is_gsm8k: bool, where: str) -> Problem:
    question, answer = _question(record, where), _first(record, ANSWER_KEYS, where)
    known = next((str(record[key]) for key in ID_KEYS if key in record), None)
    identifier = known or f"{zlib.crc32(question.encode()):0{_IDENTIFIER_CHARS}d}"
    return Problem(identifier, question, _final_number(answer, where) if is_gsm8k else answer)


def _question(record: Mapping[str, Any], where: str) -> str:
    """Some sets (ASDiv) tell the story in one field and ask about it in another."""
    question = _first(record, QUESTION_KEYS, where)
    body = next((str(record[key]).strip() for key in BODY_KEYS if record.get(key)), "")
    return f"{body} {question}" if body and body not in question else question


def _first(record: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    """The first of these fields that says something; a list of one is that one.

    Raises:
        ValueError: none does, or one has several values, or one that is neither text nor number.
    """
    for key in keys:
        value = record.get(key)
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if value is None or value == "" or value == []:
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"{where}: {key} must be one text or number, got {value!r:.80}; give one value a problem")
        return str(value)
    raise ValueError(f"{where} must have one of the fields {', '.join(keys)}, got {', '.join(record) or 'none'}")


def _final_number(answer: str, where: str) -> str:
    """A GSM8K answer is its whole solution with the number after ####; a bare number is taken as it is."""
    final = _FINAL.search(answer)
    if final is None and "\n" in answer:
        raise ValueError(f"{where}: an answer of several lines must end in '#### number', got {answer[-40:]!r}")
    return (final[1] if final else answer).strip().replace(",", "")
