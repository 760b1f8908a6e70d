"""The bench on a real model and its checkpoint, as far as they go without one."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from bench import real_model, rows
from bench.real_model import (
    POLICIES,
    Group,
    cost_table,
    plot,
    server_cpu_s,
    settings,
    solve_together,
    summary,
    unsolved,
)
from bench.smollm2 import MARKER, cache_folder, check_file, is_whole
from sglang_ets.tools.datasets import Problem, load

GSM8K, MATH = ("gsm8k", "confidence", 224), ("math500", "confidence", 224)
KV: dict[str, Any] = {
    "kv_tokens_peak": 90, "kv_referenced_mean": 200, "prm_tokens": 1, "levels": 2, "leaves": 8.0, "distinct_texts": 7.0,
    "step_tokens": 20.0,
}  # fmt: skip


def row(policy: str, problem: str, is_right: bool, group: Group = GSM8K, **more: Any) -> dict[str, Any]:
    made = {"setting": f"{policy}@8", "policy": policy, "width": 8, "problem": problem, "seed": 0, "is_right": is_right}
    made |= dict(zip(("data", "prm", "max_tokens"), group, strict=True))
    made |= {"is_right_strict": False, "answer": "1", "completion_tokens": 10, "seconds": 1.0, "cpu_seconds": 2.0}
    return made | more


def test_every_policy_is_asked_beside_the_plain_baselines() -> None:
    names = [setting.name for setting in settings(8, POLICIES)]
    assert names == ["greedy", "self_consistency", *POLICIES]
    assert all(setting.search["step_delimiter"] == ["\n"] for setting in settings(8, POLICIES)[2:])


def test_the_summary_compares_kv_and_throughput_and_counts_disagreement() -> None:
    done = [
        row("rebase", "a", True, kv_tokens_mean=100, clusters=None, **KV),
        row("ets", "a", False, kv_tokens_mean=50, clusters=3.0, **KV, seconds=4.0),
        row("self_consistency", "a", False, answer=None),
    ]
    text, lines = summary(done, seed=0)
    assert {line["policy"]: line.get("kv_reduction") for line in lines[GSM8K]} == {
        "rebase": 1.0,
        "ets": 2.0,
        "self_consistency": None,
    }
    assert "## gsm8k, confidence, 224 tokens" in text
    assert "| rebase | 8 | 100.0 | 200.0 | 90.0 | 8.0 | 7.0 |  | 20.0 | 10.0 | 5.0 | 1/1 | 1/1 |" in text
    assert "| ets | 8 | 50.0 | 200.0 | 90.0 | 8.0 | 7.0 | 3.0 | 20.0 | 2.5 | 5.0 | 1/1 | 0/1 |" in text
    assert "| self_consistency | 8 |  |  |  |  |  |  |  | 10.0 | 5.0 | 0/1 | 0/1 |" in text


def test_throughput_is_all_tokens_over_all_seconds() -> None:
    done = [
        row("greedy", "a", False, completion_tokens=30, seconds=1.0),
        row("greedy", "b", False, completion_tokens=10, seconds=4.0),
    ]
    assert "| 8.0 | 10.0 | 2/2 |" in cost_table(done)
    del done[0]["cpu_seconds"]  # its time was shared with another setting's
    assert "|  |  | 2/2 |" in cost_table(done)


def test_data_sets_and_prm_formats_are_never_mixed() -> None:
    judged = ("gsm8k", "judge", 224)
    done = [
        row(policy, "a", is_right, group, kv_tokens_mean=kv, clusters=None, **KV)
        for group, is_right, held in ((GSM8K, True, (100, 50)), (MATH, False, (90, 30)), (judged, False, (80, 80)))
        for policy, kv in zip(("rebase", "dvts"), held, strict=True)
    ]
    text, lines = summary(done, seed=0)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## gsm8k, confidence, 224 tokens",
        "## gsm8k, judge, 224 tokens",
        "## math500, confidence, 224 tokens",
    ]
    found = {group: {s["policy"]: (s["kv_reduction"], s["accuracy"]) for s in own} for group, own in lines.items()}
    assert found == {
        GSM8K: {"rebase": (1.0, 1.0), "dvts": (2.0, 1.0)},
        judged: {"rebase": (1.0, 0.0), "dvts": (1.0, 0.0)},
        MATH: {"rebase": (1.0, 0.0), "dvts": (3.0, 0.0)},
    }


def test_a_run_goes_on_where_its_own_data_set_format_and_limit_stopped(tmp_path: Path) -> None:
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(f'{{"question": "{i} + {i}?", "answer": "{2 * i}"}}\n' for i in range(9)))
    out, problems = tmp_path / "rows.jsonl", load(str(data), limit=2)
    here = (data.name, "confidence", 224)
    elsewhere = [(data.name, "judge", 224), ("math500", "confidence", 224), (data.name, "confidence", 160)]
    for group in (here, *elsewhere):
        rows.append(out, row("rebase", problems[0].id, False, group))
    for group in elsewhere:
        rows.append(out, row("dvts", problems[0].id, False, group))
    args = argparse.Namespace(
        data=[str(data)], prm_format="confidence", max_tokens=224, policies=["rebase", "dvts"], width=8, problems=2,
        in_flight=2, seed=0,
    )  # fmt: skip
    first, second = (problem.id for problem in problems)
    both = [first, second]
    todo = [(setting.name, [problem.id for problem in batch]) for _, setting, batch in unsolved(args, out)]
    assert todo == [("greedy", both), ("self_consistency", both), ("rebase", [second]), ("dvts", both)]
    args.in_flight = 1
    todo = [(setting.name, [problem.id for problem in batch]) for _, setting, batch in unsolved(args, out)]
    assert todo[:4] == [("greedy", [first]), ("self_consistency", [first]), ("dvts", [first]), ("greedy", [second])]


def test_problems_in_flight_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, work = iter([100.0, 106.0]), iter([10.0, 14.0])
    monkeypatch.setattr("bench.real_model.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(real_model, "server_cpu_s", lambda: next(work))
    monkeypatch.setattr(real_model, "solve", lambda _client, _setting, problem, *_rest: {"problem": problem.id})
    problems = [Problem(name, "", "") for name in "ab"]
    done = solve_together(cast(Any, None), settings(8, [])[0], problems, 10, 0)
    assert done == [{"problem": name, "in_flight": 2, "seconds": 3.0, "cpu_seconds": 2.0} for name in "ab"]


def test_the_servers_cpu_time_is_that_of_child_processes() -> None:
    code = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass\nprint(flush=True); input()"
    before = server_cpu_s()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        spent = server_cpu_s() - before
        child.communicate(b"\n")
    assert spent >= 0.3


def test_the_plot_has_a_panel_for_each_group_and_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    made: list[Any] = []
    monkeypatch.setattr(pyplot, "close", made.append)
    done = [
        row(
            "rebase", "a", False, group, width=width, setting=f"rebase@{width}", kv_tokens_mean=100, clusters=None, **KV
        )
        for group, width in ((GSM8K, 8), (GSM8K, 16), (MATH, 8))
    ]
    plot(summary([*done, row("greedy", "a", False, MATH)], seed=0)[1], tmp_path / "plot.png")
    titles = [axis.get_title() for axis in made[0].axes]
    monkeypatch.undo()
    pyplot.close(made[0])
    assert titles == [
        "gsm8k, confidence, 224 tokens, width 8",
        "gsm8k, confidence, 224 tokens, width 16",
        "math500, confidence, 224 tokens, width 8",
    ]
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_rows_of_this_repository_make_their_tables() -> None:
    done = list(rows.read(rows.RESULTS / "real_model.jsonl"))
    assert done and not [one for one in done if "/" in one["data"]]
    text, _ = summary(done, seed=0)
    assert (rows.RESULTS / "real_model.md").read_text(encoding="utf-8") == text + "\n"


def test_another_file_than_the_known_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must contain"):
        check_file(tmp_path / "missing.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="must have sha256"):
        check_file(other)


def test_a_checkpoint_is_whole_only_with_the_marker_of_this_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder == tmp_path / "sglang-ets" / "smollm2"
    folder.mkdir(parents=True)
    assert not is_whole(folder)
    (folder / MARKER).write_text('{"gguf_sha256": "of an older one"}')
    assert not is_whole(folder)
