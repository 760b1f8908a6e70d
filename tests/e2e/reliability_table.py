"""`python -m tests.e2e.reliability_table` writes the table of docs/reliability.md from the parameters of its tests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.e2e.faulty import PHASES
from tests.e2e.test_faults import FAULTS, REFUSED, SIGTERM, Fault

DOC = Path(__file__).parents[2] / "docs" / "reliability.md"
_MARK = re.compile(r"(<!-- faults: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADER = ("fault", "before the first level", "steps decode", "the PRM scores", "selection runs", "the answer is ranked")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def faults() -> str:
    """A line for each fault, what becomes of the search in each phase where it can happen."""

    def row(fault: Fault) -> Iterable[str]:
        return fault.what, *(fault.outcomes[phase].words if phase in fault.outcomes else "" for phase in PHASES)

    return table(HEADER, [row(fault) for fault in (*FAULTS, SIGTERM)])


def refused() -> str:
    """A line for each ordinary request that sglang would die of."""
    return table(("request", "sentence"), [(name, f"{sentence} ...") for name, (_, _, sentence) in REFUSED.items()])


def filled(text: str) -> str:
    """The text with the tables as they are now between its marks."""
    tables = {"phases": faults, "refused": refused}
    return _MARK.sub(lambda mark: f"{mark[1]}{tables[mark[2]]()}\n{mark[3]}", text)


if __name__ == "__main__":
    DOC.write_text(filled(DOC.read_text(encoding="utf-8")), encoding="utf-8")
