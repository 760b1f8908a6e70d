"""`sglang-ets compare rebase.json ets.json`: two searches of one problem side by side, as one self-contained page.

Above, what each of them answered, held and computed; below, the page of each tree as `sglang-ets view` writes it, with KV
bars of one scale.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_ets.api.view import read_file, read_view, render
from sglang_ets.tools.ask import EXIT_BAD_INPUT

FIGURES = {
    "width": "width",
    "levels": "levels",
    "nodes_made": "steps made",
    "nodes_pruned": "steps pruned",
    "kv_tokens_mean": "KV tokens held, mean",
    "kv_tokens_peak": "KV tokens held, peak",
    "kv_referenced_mean": "KV tokens if nothing were shared, mean",
    "tokens_generated": "tokens generated",
    "tokens_computed": "tokens computed",
    "seconds": "seconds",
}
COUNTS = ("width", "levels")  # of which a ratio says nothing
STYLE = """
body { margin: 0; font: 14px/1.4 system-ui, sans-serif; color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 12px } th, td { padding: 2px 14px; text-align: right }
th:first-child { text-align: left }
tr + tr { border-top: 1px solid #ddd } main { display: flex; height: calc(100vh - 330px); min-height: 560px }
iframe { flex: 1; border: 0; border-top: 1px solid #bbb } iframe + iframe { border-left: 1px solid #bbb }
"""


def compared(paths: Sequence[Path]) -> str:
    """The page.

    Raises:
        ValueError: a file cannot be read or holds no tree; one sentence.
    """
    answers = [read_file(path) for path in paths]
    views = [read_view(answer, path.stem) for answer, path in zip(answers, paths, strict=True)]
    scale = max(view.longest_bar_tokens for view in views)
    trees = [render(replace(view, kv_scale_tokens=scale)) for view in views]
    frames = "".join(
        f'<iframe title="{html.escape(path.stem)}" srcdoc="{html.escape(tree)}"></iframe>'
        for path, tree in zip(paths, trees, strict=True)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(" and ".join(p.stem for p in paths))}'
        f"</title><style>{STYLE}</style><body>{_table(answers, paths)}<main>{frames}</main></body></html>"
    )


def _table(answers: Sequence[Any], paths: Sequence[Path]) -> str:
    figures = [_figures_of(answer) for answer in answers]
    names = [str(own.get("algorithm", path.stem)) for own, path in zip(figures, paths, strict=True)]
    lines = [_row("", [*names, "ratio"], "th"), _row("answer", [*map(_answer_of, answers), ""])]
    for key, label in FIGURES.items():
        first, second = (own.get(key) for own in figures)
        if first is not None or second is not None:
            ratio = f"{first / second:.2f}" if key not in COUNTS and first and second else ""
            lines.append(_row(label, [_shown(first), _shown(second), ratio]))
    return f"<table>{''.join(lines)}</table>"


def _row(label: str, values: Sequence[str], cell: str = "td") -> str:
    return f"<tr><th>{html.escape(label)}</th>{''.join(f'<{cell}>{html.escape(v)}</{cell}>' for v in values)}</tr>"


def _figures_of(answer: Any) -> Mapping[str, Any]:
    own = answer.get("search") if isinstance(answer, dict) else None
    if not isinstance(own, dict):
        return {}
    usage = answer.get("usage")
    generated = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return {**own, "tokens_generated": generated}


def _answer_of(answer: Any) -> str:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    found = (choices[0].get("search") or {}).get("answer") if choices else None
    return "-" if found is None else str(found)


def _shown(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else "-" if value is None else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and print its name. Exits with 2 after one sentence when a file cannot be read."""
    made = argparse.ArgumentParser(prog="sglang-ets compare", description="Two searches of one problem on one page.")
    made.add_argument("trees", type=Path, nargs=2, metavar="TREE.json", help="an answer with return_tree")
    made.add_argument("-o", "--output", type=Path, default=Path("compare.html"), help="the page (default compare.html)")
    args = made.parse_args(arguments)
    try:
        args.output.write_text(compared(args.trees), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"sglang-ets compare: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error
    print(args.output)
