"""`sglang-ets run --data gsm8k --width 16`: the problems of a set on a running server, one line of JSON with the tree for each.

A line holds what was asked, the answer, whether it is right (by value with math-verify, and by a stricter look at the text),
usage, and the figures of the search with its tree. A run that was interrupted goes on where it stopped: what the file has an
answer to is not asked again. `sglang-ets evaluate` makes tables of such files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sglang_ets.math_process import MathProcess
from sglang_ets.tools.ask import (
    DEFAULT_URL,
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    check_width,
    parse_settings,
    sentence_of,
)
from sglang_ets.tools.datasets import EMBEDDED_PROBLEMS, SPLITS, Problem, Split, load
from sglang_ets.tools.grading import grade

EMBEDDED = "embedded"
FILE_WIDTH = 160

Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What is asked of every problem: with the problem's id, the name of a line."""

    data: str
    width: int
    search: str  # settings of the search, JSON
    temperature: float | None
    seed: int
    max_tokens: int | None
    is_chat: bool = True

    def body(self) -> dict[str, Any]:
        """Arguments of the client's call, apart from the prompt. The tree comes back."""
        body: dict[str, Any] = {"model": "default", "seed": self.seed}
        for name in ("temperature", "max_tokens"):
            if getattr(self, name) is not None:
                body[name] = getattr(self, name)
        search = {**json.loads(self.search), "return_tree": True}
        return {**body, "extra_body": {"search_width": self.width, "search": search}}


def problems_of(data: str, limit: int | None, split: Split) -> list[Problem]:
    """Of a data set, or of the embedded task, which has no splits. Raises what `datasets.load` raises."""
    if data != EMBEDDED:
        return load(data, limit, split)
    lines = EMBEDDED_PROBLEMS.read_text(encoding="utf-8").splitlines()[:limit]
    records = [json.loads(line) for line in lines]
    return [Problem(str(number), record["prompt"], str(record["answer"])) for number, record in enumerate(records)]


def solve(client: openai.OpenAI, asked: Asked, problem: Problem) -> Row:
    """One problem, not graded yet.

    Raises:
        openai.APIError: no server, a refusal, or a search that failed.
        ValueError: the server does not search.
    """
    started = time.perf_counter()
    if asked.is_chat:
        messages: Any = [{"role": "user", "content": problem.prompt}]
        answer: Any = client.chat.completions.create(messages=messages, **asked.body())
        text = answer.choices[0].message.content or ""
    else:
        prompt = problem.question if problem.question.endswith("\n") else f"{problem.question}\n"
        answer = client.completions.create(prompt=prompt, **asked.body())
        text = answer.choices[0].text
    if getattr(answer, "search", None) is None:
        raise ValueError("the server answered without a search; start it with `sglang-ets serve`")
    return {
        **asdict(asked), "problem": problem.id, "question": problem.question, "expected": problem.answer,
        "answer": answer.choices[0].search["answer"], "text": text, "usage": answer.usage.model_dump(),
        "seconds": time.perf_counter() - started, "search_result": answer.search,
    }  # fmt: skip


def run(
    client: openai.OpenAI,
    jobs: Sequence[tuple[Asked, Problem]],
    out: Path,
    in_flight: int,
    judge: MathProcess | None = None,
) -> Iterator[tuple[int, int]]:
    """Append a graded line for each job that has none; yields lines written and to be written in all.

    `judge` grades and stays the caller's; without one, a process for this run alone.

    Raises:
        openai.APIError: see `solve`; what is in flight is finished and written first.
        ValueError: see `solve`.
    """
    known = {key_of(row) for row in rows_in(out)}
    todo = [(asked, problem) for asked, problem in jobs if (*astuple(asked), problem.id) not in known]
    _mend(out)
    grader = judge or MathProcess()
    yield 0, len(todo)
    failed: openai.APIError | None = None
    num_done = 0
    with ThreadPoolExecutor(in_flight) as pool, out.open("a", encoding="utf-8") as file:
        futures = [pool.submit(solve, client, *job) for job in todo]
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if isinstance(error := future.exception(), openai.APIError):
                    failed = failed or error
                    for waiting in futures:
                        waiting.cancel()  # what runs already is still written
                    continue
                row = future.result()
                file.write(json.dumps(row | asdict(grade(grader, row["answer"], row["expected"]))) + "\n")
                file.flush()
                num_done += 1
                yield num_done, len(todo)
        finally:
            pool.shutdown(cancel_futures=True)
            if judge is None:
                grader.stop()
    if failed is not None:
        raise failed


def _mend(path: Path) -> None:
    """Take away a last line that was cut off while it was written."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a line answers."""
    return (*(row[name] for name in Asked.__dataclass_fields__), row["problem"])


def rows_in(path: Path) -> Iterator[Row]:
    """The lines of a run; the last one may have been cut off.

    Raises:
        ValueError: a line before the last cannot be read.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path.name}, line {number}, must be a JSON object ({error}); is it a file of a run?"
                ) from None


def table_of(rows: Sequence[Row], asked: Iterable[Asked] = ()) -> Table:
    """One line for each way to ask: as asked for now, then those of earlier runs."""
    groups: dict[tuple[Any, ...], list[Row]] = {astuple(way): [] for way in asked}
    for row in rows:
        groups.setdefault(key_of(row)[:-1], []).append(row)
    table = Table()
    for name in (
        "data",
        "width",
        "algorithm",
        "settings",
        "problems",
        "right",
        "strictly",
        "KV held",
        "tokens",
        "seconds",
    ):
        table.add_column(name, justify="left" if name in ("data", "algorithm", "settings") else "right")
    for own in filter(None, groups.values()):
        count, first = len(own), own[0]
        means = [
            sum(row["search_result"]["kv_tokens_mean"] for row in own) / count,
            sum(row["usage"]["completion_tokens"] for row in own) / count,
        ]
        table.add_row(
            first["data"], str(first["width"]), first["search_result"]["algorithm"], _settings_text(first), str(count),
            *(f"{sum(row[name] for row in own) / count:.3f}" for name in ("is_right", "is_right_strict")),
            *(f"{mean:.0f}" for mean in means), f"{sum(row['seconds'] for row in own) / count:.1f}",
        )  # fmt: skip
    return table


def _settings_text(row: Row) -> str:
    """What was set beside the algorithm, which has a column of its own."""
    return " ".join(f"{name}={value}" for name, value in json.loads(row["search"]).items() if name != "algorithm")


def console_of() -> Console:
    """Wide where nobody looks: a file or a pipe takes a table as it is."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="sglang-ets run", description="Solve the problems of a set on a running server."
    )
    made.add_argument(
        "--data",
        required=True,
        help=f"gsm8k, math500, a JSONL file or owner/name on the Hub; or {EMBEDDED}",
    )
    made.add_argument(
        "--split", choices=SPLITS, default="report",
        help="of a data set: what to report on (default), the fifth left for choosing settings on, or both",
    )  # fmt: skip
    made.add_argument("--width", type=int, nargs="+", default=[16], help="trajectories to grow (default 16)")
    made.add_argument("--algorithm", nargs="+", default=[None], metavar="NAME", help="default: the server's --search")
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the search")
    made.add_argument("--limit", type=int, help="problems at most")
    made.add_argument(
        "--temperature", type=float, help="default: the server's, for a chat that of the model's generation_config.json"
    )
    made.add_argument("--max-tokens", type=int, help="tokens of one trajectory; default: the server's")
    made.add_argument(
        "--completion", action="store_true", help="send the question and a newline, not a chat that asks for a box"
    )
    made.add_argument("--seed", type=int, default=0, help="of every search (default 0)")
    made.add_argument("--in-flight", type=int, default=4, help="problems at once (default 4)")
    made.add_argument("--base-url", default=DEFAULT_URL, help=f"of the server or router (default {DEFAULT_URL})")
    made.add_argument("--api-key", default="none")
    made.add_argument("--out", type=Path, default=Path("run.jsonl"), help="rows with full trees (default run.jsonl)")
    return made


def jobs_of(args: argparse.Namespace) -> list[tuple[Asked, Problem]]:
    """All ways to ask for a problem before the next problem, so that an interrupted run compares equal sets.

    Raises:
        ValueError: a setting or the data cannot be read, or a width is 1.
    """
    for width in args.width:
        check_width(width)
    common = parse_settings(args.set)
    searches = [{**({"algorithm": name} if name else {}), **common} for name in args.algorithm]
    ways = [
        Asked(
            Path(args.data).name,
            width,
            json.dumps(search),
            args.temperature,
            args.seed,
            args.max_tokens,
            not (args.completion or args.data == EMBEDDED),
        )
        for width in args.width
        for search in searches
    ]
    return [(asked, problem) for problem in problems_of(args.data, args.limit, args.split) for asked in ways]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, show the table. Exits with 2 for wrong arguments and 1 when the server fails, after one sentence."""
    args = parser().parse_args(arguments)
    url = args.base_url.rstrip("/").removesuffix("/v1")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=args.api_key, timeout=3600, max_retries=0)
    console = console_of()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        jobs = jobs_of(args)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(Path(args.data).name, total=None)
            for done, total in run(client, jobs, args.out, args.in_flight):
                progress.update(task, completed=done, total=total)
        rows = [row for row in rows_in(args.out) if row["data"] == Path(args.data).name]
        console.print(table_of(rows, (asked for asked, _ in jobs)))
    except (ValueError, OSError, ImportError) as error:
        _leave(str(error), EXIT_BAD_INPUT)
    except openai.APIConnectionError:
        _leave(f"no server answers at {url}; start one with `sglang-ets serve`, then the run goes on", EXIT_FAILED)
    except openai.APIError as error:
        _leave(f"{sentence_of(error)}; what is done is in {args.out}", EXIT_FAILED)
    except KeyboardInterrupt:
        _leave(f"stopped; the same command goes on from {args.out}", EXIT_INTERRUPTED)


def _leave(message: str, status: int) -> None:
    print(f"sglang-ets run: {message}", file=sys.stderr)
    raise SystemExit(status)
