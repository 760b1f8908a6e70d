"""`sglang-ets evaluate run.jsonl`: accuracy by how step scores become a score, how the answer is chosen, and of how many.

From saved trees alone, nothing is run again. The files are those of `sglang-ets run`, or `answers.json` in the layout of the
ETS and REBASE repositories. Of a search of width W the first n complete trajectories are taken, in the order in which their
steps were made. A cell is the share of right answers with a 95 % interval (Wilson): by value (math-verify), and by the strict
look at the text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from scipy.stats import binomtest

from sglang_ets.core.answer import Trajectory, rank
from sglang_ets.core.config import Aggregation, AnswerRule, SearchConfig
from sglang_ets.core.patterns import extract_answer
from sglang_ets.math_process import MathProcess
from sglang_ets.testing import path_to, trees_in
from sglang_ets.tools.ask import EXIT_BAD_INPUT
from sglang_ets.tools.grading import Grade, grade
from sglang_ets.tools.run import console_of, rows_in

RULE_NAMES: Mapping[AnswerRule, str] = {
    "best": "best of n",
    "majority": "majority",
    "weighted_majority": "weighted majority",
}


@dataclass(frozen=True)
class Solved:
    """One problem: what its search completed."""

    name: str  # of the way it was asked: a group of its own
    width: int
    expected: str
    trajectories: tuple[Trajectory, ...]


@dataclass
class Grader:
    """Grades each pair of texts once; at the end of a `with` block its process ends."""

    process: MathProcess = field(default_factory=MathProcess)
    known: dict[tuple[str | None, str], Grade] = field(default_factory=dict)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.stop()

    def of(self, answer: str | None, expected: str) -> Grade:
        pair = (answer, expected)
        if pair not in self.known:
            self.known[pair] = grade(self.process, answer, expected)
        return self.known[pair]


@dataclass(frozen=True)
class Cell:
    """Accuracy of one way to choose."""

    right: int
    strictly: int
    count: int

    def text(self, right: int) -> str:
        low, high = binomtest(right, self.count).proportion_ci(method="wilson")
        return f"{right / self.count:.3f} [{low:.3f}, {high:.3f}]"


Key = tuple[str, int, Aggregation, AnswerRule]  # group, n, step scores to a score, how the answer is chosen


def solved_in(path: Path) -> Iterator[Solved]:
    """The problems of a file.

    Raises:
        ValueError: it is neither a run nor a list of answers as the ETS repository writes it.
    """
    if path.suffix == ".jsonl":
        for row in rows_in(path):
            if "search_result" not in row:
                raise ValueError(f"{path.name} must hold rows of `sglang-ets run`, got fields {', '.join(row)}")
            figures = row["search_result"]
            (tree,) = trees_in(figures)
            name = f"{row['data']}, {figures['algorithm']} width {row['width']} {row['search']}"
            yield Solved(name, row["width"], row["expected"], tuple(_complete(tree["nodes"])))
        return
    answers = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(answers, list) or not all(isinstance(one, dict) and "model_answer" in one for one in answers):
        raise ValueError(
            f"{path.name} must be rows of `sglang-ets run` (.jsonl) or a list of objects with model_answer"
        )
    for one in answers:
        own = [
            Trajectory(place, (), made["text"].removeprefix(one["question"]), tuple(made["step_scores"]), "stop")
            for place, made in enumerate(one["model_answer"])
        ]
        yield Solved(path.parent.name or path.stem, len(own), str(one["ground_truth_answer"]), tuple(own))


def _complete(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Trajectory]:
    by_id = {node["id"]: node for node in nodes}
    for node in nodes:
        if node["state"] == "complete":
            path = path_to(node, by_id)
            scores = tuple(step["score"] for step in path if step["score"] is not None)
            yield Trajectory(node["id"], (), "".join(step["text"] for step in path), scores, "stop")


def evaluate(problems: Sequence[Solved], pattern: str, counts: Sequence[int]) -> dict[Key, Cell]:
    """Every way to choose, of the problems of each group.

    Raises:
        ValueError: `pattern` is wrong.
    """
    grades: dict[Key, list[Grade]] = defaultdict(list)
    with Grader() as grader:
        for problem in problems:
            widths = counts or [2**power for power in range(problem.width.bit_length()) if 2**power <= problem.width]
            for n in widths:
                for aggregation in get_args(Aggregation):
                    for rule in get_args(AnswerRule):
                        config = SearchConfig(answer=rule, score_aggregation=aggregation, answer_pattern=pattern)
                        ranked = rank(problem.trajectories[:n], config)
                        answer = ranked[0].answer if ranked else None
                        grades[problem.name, n, aggregation, rule].append(grader.of(answer, problem.expected))
    return {
        key: Cell(sum(g.is_right for g in own), sum(g.is_right_strict for g in own), len(own))
        for key, own in grades.items()
    }


def has_answers(problems: Sequence[Solved], pattern: str) -> bool:
    """Whether `pattern` finds an answer in any trajectory."""
    trajectories = (trajectory for problem in problems for trajectory in problem.trajectories)
    return any(extract_answer(trajectory.text, pattern) is not None for trajectory in trajectories)


def tables_of(cells: Mapping[Key, Cell]) -> Iterator[Table]:
    """One table for each group. A majority does not read scores; the strict grader has a line where it differs."""
    for name in dict.fromkeys(key[0] for key in cells):
        own = {key[1:]: cell for key, cell in cells.items() if key[0] == name}
        counts = sorted({n for n, _, _ in own})
        table = Table(title=f"{name}, {next(iter(own.values())).count} problems", title_justify="left")
        for column in ("answer", "step scores", "grader", *(f"n={n}" for n in counts)):
            table.add_column(column, justify="right" if column.startswith("n=") else "left", no_wrap=True)
        for rule, rule_name in RULE_NAMES.items():
            for aggregation in get_args(Aggregation) if rule != "majority" else ("last",):
                shown = aggregation if rule != "majority" else "-"
                of_rule = [own[n, aggregation, rule] for n in counts]
                table.add_row(rule_name, shown, "by value", *(cell.text(cell.right) for cell in of_rule))
                if any(cell.strictly != cell.right for cell in of_rule):
                    table.add_row("", "", "strict", *(cell.text(cell.strictly) for cell in of_rule))
        yield table


def plot(cells: Mapping[Key, Cell], path: Path) -> None:
    """Accuracy by value against n, a panel for each group and a line for each way to choose.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a plot needs matplotlib, which is not installed; install it or leave --plot out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(key[0] for key in cells))
    figure, axes = pyplot.subplots(1, len(names), figsize=(6 * len(names), 4.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        lines: dict[str, list[tuple[int, Cell]]] = defaultdict(list)
        for (group, n, aggregation, rule), cell in cells.items():
            if group == name and (rule != "majority" or aggregation == "last"):
                lines[RULE_NAMES[rule] + ("" if rule == "majority" else f", {aggregation}")].append((n, cell))
        for label, points in lines.items():
            points.sort(key=lambda point: point[0])
            axis.plot([n for n, _ in points], [cell.right / cell.count for _, cell in points], marker="o", label=label)
        axis.set(title=name, xlabel="trajectories", ylabel="accuracy", xscale="log", ylim=(0, 1))
        axis.title.set_fontsize(8)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tables, and with `--plot` a picture. Exits with 2 after one sentence if a file cannot be read."""
    made = argparse.ArgumentParser(prog="sglang-ets evaluate", description="Accuracy of a run, from its saved trees.")
    made.add_argument(
        "rows", type=Path, nargs="+", help="files of `sglang-ets run`, or answers.json of the ETS repository"
    )
    made.add_argument(
        "--n", type=int, nargs="+", default=[], help="trajectories; default: powers of two up to the width"
    )
    made.add_argument("--answer-pattern", default="boxed", help="where the answer stands (default boxed)")
    made.add_argument("--plot", type=Path, metavar="OUT.png")
    args = made.parse_args(arguments)
    try:
        problems = [problem for path in args.rows for problem in solved_in(path)]
        if not problems:
            raise ValueError(f"{', '.join(map(str, args.rows))} must hold solved problems, got none; run some first")
        cells = evaluate(problems, args.answer_pattern, args.n)
        if not has_answers(problems, args.answer_pattern):
            found = f"--answer-pattern {args.answer_pattern} finds no answer in any trajectory"
            print(f"sglang-ets evaluate: {found}; give the one of the run, for example the_answer_is", file=sys.stderr)
        for table in tables_of(cells):
            console_of().print(table)
        if args.plot:
            plot(cells, args.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"sglang-ets evaluate: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error
