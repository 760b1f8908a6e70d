"""`sglang-ets view TREE.json`: one search's tree as one HTML file that needs no network.

TREE.json is a whole answer to a request with `return_tree`, its `search` object, or the bare tree. The page is this
package's `view_page.html` with its style, its script and the tree inside; all figures are made here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sglang_ets.api.view_tree import KvLevel, ViewNode, kv_levels, read_nodes

# What of the figures the page shows, if it is there.
FIGURES = (
    "algorithm", "width", "seed", "finish_reason", "kv_tokens_peak", "kv_tokens_mean", "tokens_computed", "seconds",
)  # fmt: skip
EXIT_BAD_INPUT = 2
# Inside <script> only these can end the element or open a comment, and JSON reads the escapes back.
OFFLINE, LIVE = "", "; connect-src 'self'"  # a live page may ask its own server, nothing else
DEFAULT_TEMPERATURE = 0.2
SCRIPT_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@dataclass(frozen=True)
class Answer:
    """One ranked result, best first, and the node that it ends with if the tree shows it."""

    answer: str
    score: float | None
    votes: float | None
    finish: str
    node: int | None


@dataclass(frozen=True)
class SearchView:
    """What the page shows."""

    title: str
    figures: dict[str, Any]
    prompt_tokens: int
    nodes: tuple[ViewNode, ...]
    levels: tuple[KvLevel, ...]
    answers: tuple[Answer, ...]
    rebase_temperature: float
    is_live: bool = False  # the search still runs, and the page follows it
    note: str = ""  # why it has no answer
    warnings: tuple[str, ...] = ()  # what makes the answer less than it could be, a sentence each
    kv_scale_tokens: int = 0  # of the longest KV bar at least, so that pages side by side have bars of one scale

    @property
    def longest_bar_tokens(self) -> int:
        """What the longest KV bar of this tree shows."""
        held = [tokens for level in self.levels for tokens in (level.held_tokens, level.measured_held_tokens)]
        return max((tokens for tokens in held if tokens is not None), default=0)


def read_view(data: Any, title: str, rebase_temperature: float | None = None) -> SearchView:
    """The page's content from what a client was given. Without a temperature REBASE gets the one of the search.

    Raises:
        ValueError: no tree is inside, or it breaks the schema of docs/api.md; one sentence.
    """
    figures, tree = _parts(data)
    if rebase_temperature is None:
        rebase_temperature = _temperature_of(figures)
    if not rebase_temperature > 0:
        raise ValueError(f"the temperature of REBASE must be above 0, got {rebase_temperature}; the default is 0.2")
    nodes = read_nodes(tree)
    prompt_tokens = tree["prompt_tokens"]
    algorithm = figures.get("algorithm")
    measured = figures.get("kv_levels") or []
    levels = kv_levels(nodes, prompt_tokens, algorithm, measured, rebase_temperature)
    shown = {name: figures[name] for name in FIGURES if isinstance(figures.get(name), (str, int, float))}
    choices = data.get("choices") if isinstance(data, dict) else None
    answers = _given_answers(choices, nodes) if isinstance(choices, list) else _complete_nodes(nodes)
    warnings = _warnings_of(figures)
    return SearchView(title, shown, prompt_tokens, nodes, levels, answers, rebase_temperature, warnings=warnings)


def empty_view(data: Mapping[str, Any], title: str) -> SearchView:
    """The content of a search that has no steps yet, or never got any; `data` as `read_view` takes it."""
    figures, tree = _parts(data)
    shown = {name: figures[name] for name in FIGURES if isinstance(figures.get(name), (str, int, float))}
    warnings = _warnings_of(figures)
    return SearchView(title, shown, tree["prompt_tokens"], (), (), (), _temperature_of(figures), warnings=warnings)


def render(view: SearchView) -> str:
    """The page, self-contained. Text of the model stands in it as escaped JSON only."""
    page = _asset("html").replace("/*STYLE*/", _asset("css")).replace("/*SCRIPT*/", _asset("js"))
    page = page.replace("/*CONNECT*/", LIVE if view.is_live else OFFLINE)
    return page.replace("/*DATA*/", page_data(view))  # last, so that nothing in the data is taken for a mark


def page_data(view: SearchView) -> str:
    """The view as the page's script reads it: JSON on one line that no HTML can end."""
    data = asdict(view)
    for node in data["nodes"]:
        node["tokens"] = len(node.pop("token_ids"))
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(SCRIPT_ESCAPES)


def _temperature_of(figures: Mapping[str, Any]) -> float:
    """REBASE's temperature in this search; answers of earlier servers do not hold it."""
    value = figures.get("rebase_temperature")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    return float(value) if is_number else DEFAULT_TEMPERATURE  # type: ignore[arg-type]


def _warnings_of(figures: Mapping[str, Any]) -> tuple[str, ...]:
    warnings = figures.get("warnings")
    return tuple(text for text in warnings if isinstance(text, str)) if isinstance(warnings, list) else ()


def _asset(kind: str) -> str:
    return resources.files("sglang_ets.api").joinpath(f"view_page.{kind}").read_text(encoding="utf-8")


def _parts(data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and tree, wherever they stand."""
    if not isinstance(data, dict):
        raise ValueError(
            f"a tree is a JSON object, got {type(data).__name__}; save the answer of a request with search.return_tree"
        )
    figures = data.get("search", data)
    figures = figures if isinstance(figures, dict) else {}
    tree = figures if "nodes" in figures else figures.get("tree")
    if not isinstance(tree, dict):
        raise ValueError(
            "the answer must hold search.tree, got none; send the request again with search.return_tree true"
        )
    return figures, tree


def _given_answers(choices: Sequence[Any], nodes: Sequence[ViewNode]) -> tuple[Answer, ...]:
    """The choices of the response. A choice belongs to the node that ends with its text; equal texts take one node each."""
    ends: dict[str, list[int]] = {}
    texts = {0: ""}
    for node in nodes:
        texts[node.id] = texts[node.parent] + node.text
        if node.state != "pruned":
            ends.setdefault(texts[node.id], []).append(node.id)
    answers = []
    for choice in choices:
        plain: Mapping[str, Any] = choice if isinstance(choice, dict) else {}
        details = plain.get("search") or {}
        text = plain.get("text") if "text" in plain else (plain.get("message") or {}).get("content")
        ended = ends.get(text) if isinstance(text, str) else None
        finish = str(plain.get("finish_reason"))
        answer = details.get("answer")
        shown = "-" if answer is None else str(answer)
        answers.append(
            Answer(shown, details.get("score"), details.get("votes"), finish, ended.pop(0) if ended else None)
        )
    return tuple(answers)


def _complete_nodes(nodes: Sequence[ViewNode]) -> tuple[Answer, ...]:
    """Without choices: the complete trajectories by the score of their last step. Their answers are not known."""
    ends = [node for node in nodes if node.state == "complete"]
    ends.sort(key=lambda node: -(node.score if node.score is not None else float("-inf")))
    return tuple(Answer(f"step {node.id}", node.score, None, node.finish or "", node.id) for node in ends)


def read_file(path: Path) -> Any:
    """Raises:
    ValueError: the file cannot be read or is not JSON; one sentence.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give the file that holds the answer") from error
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{path} must be JSON, but {error}; save the response body as it came") from error
    except RecursionError as error:
        raise ValueError(
            f"{path} must be JSON of an answer, but is nested too deeply; save the response body"
        ) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page. Exits with 2 and one sentence when the input is wrong."""
    parser = argparse.ArgumentParser(prog="sglang-ets view", description="Write a search's tree as one HTML file.")
    parser.add_argument("tree", type=Path, metavar="TREE.json", help="an answer with return_tree, or its tree")
    parser.add_argument("-o", "--output", type=Path, help="the page; default: TREE.html beside the tree")
    parser.add_argument(
        "--rebase-temperature", type=float, help="of the REBASE that is compared with; default: what the search had"
    )
    args = parser.parse_args(arguments)
    output = args.output or args.tree.with_suffix(".html")
    try:
        page = render(read_view(read_file(args.tree), args.tree.stem, args.rebase_temperature))
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {output}: {error.strerror}; choose another file with -o") from error
    except ValueError as error:
        print(f"sglang-ets view: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error
    print(output)
