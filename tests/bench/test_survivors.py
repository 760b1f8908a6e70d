"""The table of `sglang-ets tune` as rows."""

from __future__ import annotations

from bench.studies import survivors
from sglang_ets.math_process import MathProcess
from sglang_ets.tools import tune
from sglang_ets.tools.evaluate import Grader
from tests.bench.test_stopping_replay import row
from tests.tools.test_tune import tree


def test_every_setting_is_a_row_and_other_policies_are_passed_over() -> None:
    grader = Grader(MathProcess())
    made = survivors.figures_of([row("rebase", tree(), "8"), row("ets", tree(), "8")], grader)
    grader.process.stop()
    assert set(made) == {("toy", 4, name) for name, _ in tune.candidates()}
    assert {found["levels"] for found in made.values()} == {1}
    lines = survivors.table(
        [{"data": d, "width": w, "policy": p, **own} for (d, w, p), own in made.items()]
    ).splitlines()
    assert lines[0].count("|") == lines[-1].count("|") and len(lines) == len(made) + 2
