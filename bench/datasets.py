"""Problems of a data set, one record each: `load("gsm8k", split="test", limit=100)`.

`embedded` ships with the package. All others are JSONL files or names on the Hub: give a path, or put a file that begins with
the set's name (`gsm8k_test.jsonl`) into a folder and name that folder in SGLANG_ETS_DATA. Without either, the Hub is asked
through the `datasets` package.

A published test set becomes two splits by a hash of the question's text: `validation` (a fifth) to choose settings on,
`test` to report, `all` for both. The embedded problems are held out already, and are split by the same rule.
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

Split = Literal["validation", "test", "all"]
Family = Literal["embedded", "gsm8k", "math"]

DATA_ENV = "SGLANG_ETS_DATA"
EMBEDDED_FILE = Path(__file__).resolve().parents[1] / "sglang_ets" / "models" / "problems.jsonl"
VALIDATION_SHARE = 5  # one of so many
QUESTION_KEYS = ("question", "problem", "prompt")
ANSWER_KEYS = ("answer", "expected_answer")
ID_KEYS = ("unique_id", "id", "ID")
_FINAL = re.compile(r"####\s*(.+)\s*\Z")
_IDENTIFIER_CHARS = 10

# Two demands a step's form makes on the model: where a step ends (a blank line) and where the answer stands.
BOXED_TEMPLATE = (
    "Solve the following math problem step by step. Separate the steps by blank lines, and put the final answer within "
    "\\boxed{{}} at the end.\n\n{question}"
)


@dataclass(frozen=True)
class Source:
    """What is known about a data set before its file is seen."""

    family: Family
    hub: str | None = None  # owner/name on the Hub
    hub_config: str | None = None
    hub_split: str = "test"


SOURCES: dict[str, Source] = {
    "embedded": Source("embedded"),
    "gsm8k": Source("gsm8k", "openai/gsm8k", "main"),
    "math500": Source("math", "HuggingFaceH4/MATH-500"),
    "aime24": Source("math", "HuggingFaceH4/aime_2024", None, "train"),
    "aime25": Source("math", "yentinglin/aime_2025", None, "train"),
    "amc23": Source("math", "math-ai/amc23"),
}


@dataclass(frozen=True)
class Problem:
    """One question, and how to ask it and to read its answer."""

    id: str
    question: str
    answer: str  # a number for embedded and gsm8k, LaTeX for math
    answer_pattern: str  # a preset of `sglang_ets.core.patterns`
    template: str  # of a chat turn or a prompt, with one {question}

    @property
    def prompt(self) -> str:
        """The text to send: a whole prompt for the embedded task, a user's turn otherwise."""
        return self.template.format(question=self.question)


_FORMS: dict[Family, tuple[str, str]] = {
    "embedded": ("the_answer_is", "{question}"),
    "gsm8k": ("boxed", BOXED_TEMPLATE),
    "math": ("boxed", BOXED_TEMPLATE),
}


def load(name_or_path: str, split: Split = "test", limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a split, in the file's order; all if None.

    Raises:
        ValueError: the split or limit is wrong, the set is unknown, or a record lacks its question or answer.
        FileNotFoundError: a path that does not exist.
        ModuleNotFoundError: the Hub is needed, and the `datasets` package is not there.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}; name one of them")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out for all problems")
    family, records, where = _open(name_or_path)
    found: list[Problem] = []
    for number, record in enumerate(records, 1):
        problem = _problem(record, family, f"{where}, record {number}")
        if split in ("all", split_of(problem.question)):
            found.append(problem)
        if len(found) == limit:
            break
    if not found:
        raise ValueError(f"{where} must have a problem in split {split!r}, it has none; take another split")
    return found


def split_of(question: str) -> Literal["validation", "test"]:
    """A property of the text alone, so that no question can be in both, whatever the file's order."""
    return "validation" if zlib.crc32(question.strip().encode()) % VALIDATION_SHARE == 0 else "test"


def _open(name_or_path: str) -> tuple[Family, Iterable[Mapping[str, Any]], str]:
    """Family, records and a name for messages: a set's own name first, then a path, then a name on the Hub."""
    if name_or_path == "embedded":
        return "embedded", _jsonl(EMBEDDED_FILE), "embedded"
    source = SOURCES.get(name_or_path)
    if source is not None:
        path = _in_data_folder(name_or_path)
        if path is not None:
            return source.family, _jsonl(path), path.name
        return source.family, _hub(str(source.hub), source.hub_config, source.hub_split), str(source.hub)
    path = Path(name_or_path)
    if path.exists() or path.suffix in (".jsonl", ".json"):
        return _family_of(path.name), _jsonl(path), path.name
    if name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")):
        return _family_of(name_or_path), _hub(name_or_path, None, "test"), name_or_path
    raise ValueError(
        f"a data set must be one of {', '.join(SOURCES)}, a JSONL file or owner/name on the Hub, got {name_or_path!r}"
    )


def _in_data_folder(name: str) -> Path | None:
    folder = os.environ.get(DATA_ENV)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{DATA_ENV} must name a folder of JSONL files, got {folder!r}; create it or unset it")
    return next(iter(sorted(Path(folder).glob(f"{name}*.jsonl"))), None)


def _family_of(name: str) -> Family:
    return "gsm8k" if "gsm8k" in name.lower() else "math"


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a JSONL file with one problem a line; there is no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}, must be JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}, line {number}, must be a JSON object, got {type(record).__name__}")
        yield record


def _hub(name: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]  # heavy, and only the Hub needs it
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{name} is fetched with the `datasets` package, which is not installed; install it, or give a JSONL file "
            f"by path or in the folder that {DATA_ENV} names"
        ) from None
    loaded: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, config, split=split)
    return loaded


def _problem(record: Mapping[str, Any], family: Family, where: str) -> Problem:
    question, answer = _first(record, QUESTION_KEYS, where), _first(record, ANSWER_KEYS, where)
    if family == "gsm8k":
        answer = _final_number(answer, where)
    pattern, template = _FORMS[family]
    # A question is left as it is: blanks at its end are part of the embedded task's prompt.
    known = next((str(record[key]) for key in ID_KEYS if key in record), None)
    return Problem(
        known or f"{zlib.crc32(question.encode()):0{_IDENTIFIER_CHARS}d}", question, answer, pattern, template
    )


def _first(record: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    for key in keys:
        if record.get(key) not in (None, ""):
            return str(record[key])
    raise ValueError(f"{where} must have one of the fields {', '.join(keys)}, got {', '.join(record) or 'none'}")


def _final_number(answer: str, where: str) -> str:
    """A GSM8K answer is its whole solution with the number after ####; a bare number is taken as it is."""
    final = _FINAL.search(answer)
    if final is None and "\n" in answer:
        raise ValueError(f"{where}: an answer of several lines must end in '#### number', got {answer[-40:]!r}")
    return (final[1] if final else answer).strip().replace(",", "")
