"""See it work: held-out problems solved by three search policies on a server of its own.

make demo                          or: python -m bench.demo --problems 12 --width 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.embedded import client_of, held_out_problems
from bench.server import running_server

POLICIES = ("best_of_n", "rebase", "ets")
MAX_TOKENS = 512
IN_FLIGHT = 2


@dataclass(frozen=True)
class Solved:
    """One problem under one policy, as the server answered it."""

    prompt: str
    expected: str
    answer: str | None
    kv_mean_tokens: float
    kv_peak_tokens: int
    generated_tokens: int
    seconds: float

    @property
    def is_right(self) -> bool:
        return self.answer == self.expected


def solve(client: openai.OpenAI, problem: dict[str, Any], policy: str, width: int) -> Solved:
    """One search through the ordinary OpenAI client."""
    started = time.perf_counter()
    response = client.completions.create(
        model="default",
        prompt=problem["prompt"],
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        seed=0,
        extra_body={"search_width": width, "search": {"algorithm": policy}},
    )
    search: dict[str, Any] = response.search  # type: ignore[attr-defined]
    return Solved(
        problem["prompt"],
        str(problem["answer"]),
        response.choices[0].search["answer"],  # type: ignore[attr-defined]
        search["kv_tokens_mean"],
        search["kv_tokens_peak"],
        response.usage.completion_tokens if response.usage else 0,
        time.perf_counter() - started,
    )


def show(console: Console, policy: str, solved: Solved) -> None:
    """One line per problem, printed as soon as it is solved."""
    mark = "[green]right[/]" if solved.is_right else f"[red]wrong[/] ({solved.expected})"
    console.print(f"{policy:10} {solved.prompt.strip():42} {solved.answer!s:>6}  {mark}", highlight=False)


def summary(by_policy: dict[str, list[Solved]], wall_s: dict[str, float], width: int) -> Table:
    """The table of the end: what each policy got right and what it held."""
    table = Table(title=f"search_width {width}, {len(by_policy[POLICIES[0]])} problems")
    for column in (
        "policy",
        "correct",
        "KV tokens held (mean)",
        "KV tokens held (peak)",
        "tokens generated",
        "seconds",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for policy, solved in by_policy.items():
        table.add_row(
            policy,
            f"{sum(s.is_right for s in solved)}/{len(solved)}",
            f"{sum(s.kv_mean_tokens for s in solved) / len(solved):.0f}",
            f"{sum(s.kv_peak_tokens for s in solved) / len(solved):.0f}",
            f"{sum(s.generated_tokens for s in solved)}",
            f"{wall_s[policy]:.1f}",
        )
    return table


def run(client: openai.OpenAI, problems: Sequence[dict[str, Any]], width: int, console: Console) -> Table:
    """All problems under each policy, one policy after the other."""
    by_policy: dict[str, list[Solved]] = {}
    wall_s: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(IN_FLIGHT) as pool:
        for policy in POLICIES:
            started = time.perf_counter()
            task = progress.add_task(policy, total=len(problems))
            by_policy[policy] = []
            for solved in pool.map(lambda problem, policy=policy: solve(client, problem, policy, width), problems):
                by_policy[policy].append(solved)
                show(console, policy, solved)
                progress.advance(task)
            wall_s[policy] = time.perf_counter() - started
    return summary(by_policy, wall_s, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--width", type=int, default=16)
    args = parser.parse_args()
    console = Console()
    with ExitStack() as stack:
        with console.status("starting the server") as status:
            passing = lambda seconds: status.update(f"starting the server, {seconds:.0f} s")  # noqa: E731
            url = stack.enter_context(running_server(["--search", "ets"], waiting=passing))
        console.print(run(client_of(url), held_out_problems(args.problems), args.width, console))


if __name__ == "__main__":
    main()
