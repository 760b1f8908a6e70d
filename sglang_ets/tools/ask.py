"""`sglang-ets ask "question"`: one search on a running server, watched in the terminal.

The request is an ordinary stream of the openai client. Progress rides in `search.progress` of its chunks, text
that can no longer change in their choices, the figures of the whole search in the last chunk of the last choice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import openai
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

DEFAULT_URL = "http://127.0.0.1:30000"
DEFAULT_WIDTH = 16
EMBEDDED_MODEL = "sglang-ets-embedded"  # the name under which the launcher serves the embedded models
MOST_ANSWERS = 4
LIVE_LEVELS, LIVE_LINES = 10, 8  # newest ones; what is taller than a terminal could not be drawn over
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class AskFailed(RuntimeError):
    """No answer; the message is one sentence for a person."""


@dataclass(frozen=True)
class Question:
    """What is asked, and how."""

    text: str
    width: int = DEFAULT_WIDTH
    is_chat: bool = False
    model: str = "default"
    num_results: int = MOST_ANSWERS
    max_tokens: int | None = None
    temperature: float = 1.0
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # the `search` object of the request


@dataclass
class Watched:
    """What the stream has told so far. Written by `watch` only."""

    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    progress: list[dict[str, Any]] = field(default_factory=list)  # one for each selected level
    figures: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None

    @property
    def final_text(self) -> str:
        """What every possible answer begins with; at the end, the best answer."""
        return str(self.choices.get(0, {}).get("text", ""))

    def as_answer(self) -> dict[str, Any]:
        """The same as a response without streaming would hold, for a file that `sglang-ets view` reads."""
        choices = [self.choices[index] for index in sorted(self.choices)]
        return {"choices": choices, "usage": self.usage, "search": self.figures}


def watch(client: openai.OpenAI, question: Question) -> Iterator[Watched]:
    """Run the search; yields the same object after each chunk.

    Raises:
        AskFailed: no server, a refusal, a search that failed, or a server that does not search.
    """
    url = str(client.base_url).rstrip("/").removesuffix("/v1")
    watched = Watched()
    try:
        for chunk in _start(client, replace(question, text=completed(client, question.text))):
            _take(watched, chunk.model_dump())
            yield watched
    except openai.APIConnectionError as error:
        raise AskFailed(
            f"no server answers at {url} ({error.__cause__ or error}); start one with `sglang-ets serve` or give --base-url"
        ) from error
    except openai.APIError as error:  # a refusal, or an error event on the way
        raise AskFailed(sentence_of(error)) from error
    if watched.figures is None:
        raise AskFailed(f"the server at {url} answered without a search; start it with `sglang-ets serve`")


def sentence_of(error: openai.APIError) -> str:
    """What the server said. The client's own message puts the status and the whole body around it."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)


def check_width(width: int) -> None:
    """Raises:
    ValueError: the request would be an ordinary one. What else is no width, the server says.
    """
    if width == 1:
        raise ValueError("--width must be at least 2, got 1; a request of width 1 is an ordinary one and grows no tree")


def completed(client: openai.OpenAI, text: str) -> str:
    """The problem as the served model was trained to read it: the embedded models need its newline, which shells drop.

    Raises:
        openai.APIError: the server does not name its model.
    """
    if text.endswith("\n") or EMBEDDED_MODEL not in {model.id for model in client.models.list()}:
        return text
    return f"{text}\n"


def _start(client: openai.OpenAI, question: Question) -> Any:
    fields: dict[str, Any] = {
        "model": question.model,
        "temperature": question.temperature,
        "n": question.num_results,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"search_width": question.width, "search": dict(question.settings)},
    }
    for name in ("max_tokens", "seed"):
        if getattr(question, name) is not None:
            fields[name] = getattr(question, name)
    if question.is_chat:
        return client.chat.completions.create(messages=[{"role": "user", "content": question.text}], **fields)
    return client.completions.create(prompt=question.text, **fields)


def _take(watched: Watched, chunk: Mapping[str, Any]) -> None:
    for choice in chunk.get("choices") or []:
        known = watched.choices.setdefault(
            choice["index"], {"index": choice["index"], "text": "", "finish_reason": None}
        )
        known["text"] += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        known["finish_reason"] = choice.get("finish_reason") or known["finish_reason"]
        if choice.get("search") is not None:
            known["search"] = choice["search"]
    search = chunk.get("search") or {}
    if "progress" in search:
        watched.progress.append(search["progress"])
    elif search:
        watched.figures = search
    watched.usage = chunk.get("usage") or watched.usage


# ---- what a person sees ----


def level_line(progress: Mapping[str, Any]) -> str:
    """One selected level."""
    best = progress["best_score"]
    return (
        f"level {progress['level']:>2}  {progress['retained']:>4} retained  {progress['complete']:>4} complete  "
        f"best score {'-' if best is None else format(best, '.3f')}  KV held {progress['kv_held_tokens']:>6} tokens"
    )


def live_view(watched: Watched) -> Group:
    """The display while the search runs: its levels, and the text that is final already."""
    levels = [Text(level_line(progress)) for progress in watched.progress[-LIVE_LEVELS:]]
    text = "\n".join(watched.final_text.splitlines()[-LIVE_LINES:])
    return Group(*levels or [Text("waiting for the first level")], Text(), Text(text, style="bold"))


def answers_table(watched: Watched) -> Table:
    """Ranked answers, best first."""
    table = Table(title="answers, best first", title_justify="left")
    for name, side in (("#", "right"), ("answer", "left"), ("score", "right"), ("votes", "right"), ("ended", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    table.add_column("last line", overflow="ellipsis", no_wrap=True)
    for index in sorted(watched.choices):
        choice = watched.choices[index]
        result = choice.get("search") or {}
        lines = choice["text"].strip().splitlines() or [""]
        numbers = [_number(result.get(name)) for name in ("score", "votes")]
        answer = "-" if result.get("answer") is None else str(result["answer"])
        # As Text: what a model writes in brackets is no markup.
        cells = [str(index + 1), answer, *numbers, str(choice["finish_reason"]), lines[-1]]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def summary_line(watched: Watched) -> str:
    """The figures of the whole search."""
    figures, usage = watched.figures or {}, watched.usage or {}
    return (
        f"{figures['algorithm']} width {figures['width']}: {figures['levels']} levels, {figures['nodes_made']} steps "
        f"({figures['nodes_pruned']} pruned), KV peak {figures['kv_tokens_peak']} tokens, "
        f"{usage.get('completion_tokens', '?')} tokens generated, {figures['seconds']:.2f} s, {figures['finish_reason']}"
    )


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def show(console: Console, client: openai.OpenAI, question: Question) -> Watched:
    """Run the search in front of a person: live on a terminal, a line for each level elsewhere.

    Raises:
        AskFailed: see `watch`.
    """
    watched, num_shown = Watched(), 0
    with ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(live_view(watched), console=console, transient=True))
        for watched in watch(client, question):
            if live is not None:
                live.update(live_view(watched))
            else:
                for progress in watched.progress[num_shown:]:
                    console.print(Text(level_line(progress)), soft_wrap=True)
            num_shown = len(watched.progress)
    console.print(Text(watched.final_text.rstrip(), style="bold"), soft_wrap=True)
    console.print(answers_table(watched))
    console.print(Text(summary_line(watched)), soft_wrap=True)
    for warning in (watched.figures or {}).get("warnings") or ():
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    return watched


# ---- the command ----


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` to settings of the search; a value that is not JSON is text.

    Raises:
        ValueError: a pair without a name or `=`.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not name or not mark:
            raise ValueError(f"--set needs NAME=VALUE, got {pair!r}; for example --set kv_cost_weight=2")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


class _Parser(argparse.ArgumentParser):
    """Knows that a problem may look like a flag."""

    def error(self, message: str) -> NoReturn:
        hint = '; one that begins with - stands last, behind --, as in: sglang-ets ask -- "-3+4="'
        super().error(message + (hint if "question" in message else ""))


def parser() -> argparse.ArgumentParser:
    flags_parser = _Parser(prog="sglang-ets ask", description="Solve one problem on a running server.")
    flags_parser.add_argument(
        "question",
        help="the problem; the embedded models get the newline that ends it; - reads it from standard input",
    )
    flags_parser.add_argument("--width", type=int, default=DEFAULT_WIDTH, help="trajectories to grow (default 16)")
    flags_parser.add_argument("--base-url", default=DEFAULT_URL, help=f"of the server (default {DEFAULT_URL})")
    flags_parser.add_argument("--algorithm", metavar="NAME", help="default: the server's --search")
    flags_parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the search"
    )
    flags_parser.add_argument("--chat", action="store_true", help="send it as a chat message, not as a plain prompt")
    flags_parser.add_argument(
        "--n", type=int, help=f"ranked answers (default {MOST_ANSWERS}, or the width if it is less)"
    )
    flags_parser.add_argument("--max-tokens", type=int, help="tokens of one trajectory; default: the server's")
    flags_parser.add_argument("--temperature", type=float, default=1.0)
    flags_parser.add_argument("--seed", type=int)
    flags_parser.add_argument("--model", default="default")
    flags_parser.add_argument("--api-key", default="none", help="if the server asks for one")
    flags_parser.add_argument("--timeout", type=float, default=600.0, help="seconds without a chunk before giving up")
    flags_parser.add_argument(
        "--tree", type=Path, metavar="OUT.json", help="save the answer with its tree for `sglang-ets view`"
    )
    return flags_parser


def question_of(args: argparse.Namespace) -> Question:
    """Raises:
    ValueError: a setting that cannot be read, or a width of 1.
    """
    check_width(args.width)
    settings = parse_settings(args.set)
    if args.algorithm:
        settings["algorithm"] = args.algorithm
    if args.tree:
        settings["return_tree"] = True
    text = sys.stdin.read() if args.question == "-" else args.question
    num_results = args.n if args.n is not None else max(1, min(MOST_ANSWERS, args.width))
    outer = (args.model, num_results, args.max_tokens, args.temperature, args.seed)
    return Question(text, args.width, args.chat, *outer, settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, show, save. Exits with 2 for wrong arguments and with 1 when there is no answer, after one sentence."""
    args = parser().parse_args(arguments)
    base_url = args.base_url.rstrip("/").removesuffix("/v1")
    try:
        question = question_of(args)
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=args.api_key, timeout=args.timeout, max_retries=0)
        watched = show(Console(), client, question)
        if args.tree:
            args.tree.write_text(json.dumps(watched.as_answer(), ensure_ascii=False), encoding="utf-8")
    except ValueError as error:
        _leave(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        _leave(f"cannot write {args.tree}: {error.strerror}; choose another file for --tree", EXIT_BAD_INPUT)
    except AskFailed as error:
        _leave(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        _leave("stopped; the server ends the search", EXIT_INTERRUPTED)
    if args.tree:
        print(f"tree saved; look at it with: sglang-ets view {args.tree}")


def _leave(message: str, status: int) -> None:
    print(f"sglang-ets ask: {message}", file=sys.stderr)
    raise SystemExit(status)
