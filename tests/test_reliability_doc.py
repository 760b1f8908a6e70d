"""The tables of docs/reliability.md are those of the tests."""

from __future__ import annotations

from tests.e2e.reliability_table import DOC, HEADER, faults, filled, table
from tests.e2e.test_faults import FAULTS, REFUSED


def test_the_tables_are_those_of_the_tests() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m tests.e2e.reliability_table"
    assert text.count("<!-- faults: ") == 2


def test_every_fault_has_a_line_and_every_phase_a_column() -> None:
    assert faults().count("\n") == len(FAULTS) + 2  # header, rule, SIGTERM
    assert {line.count(" | ") for line in faults().splitlines()[2:]} == {len(HEADER) - 1}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert all(name in DOC.read_text(encoding="utf-8") for name in REFUSED)


def test_a_table_is_markdown() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"
