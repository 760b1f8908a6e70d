"""The bench on a real model, as far as it goes without one, and the checkpoint of SmolLM2."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from bench import real_model, rows
from bench.real_model import (
    POLICIES,
    Case,
    Group,
    cost_table,
    figures_of,
    flags,
    settings,
    solve_together,
    summary,
    unsolved,
    voted,
)
from bench.smollm2 import MARKER, cache_folder, check_file, is_whole
from sglang_ets.math_process import MathProcess
from sglang_ets.tools import run as runs
from sglang_ets.tools import tune
from sglang_ets.tools.datasets import Problem, load
from tests.bench.test_forks import node

CASE = Case("qwen", "judge", 224, 1.0, 0)
GSM8K, MATH = CASE.group("gsm8k"), CASE.group("math500")
KV: dict[str, Any] = {
    "kv_tokens_peak": 90, "kv_referenced_mean": 200, "prm_tokens": 1, "levels": 2, "leaves": 8.0, "distinct_texts": 7.0,
    "step_tokens": 20.0, "tokens_computed": 5, "distinct_prefixes": 4,
}  # fmt: skip


def row(policy: str, problem: str, is_right: bool, group: Group = GSM8K, **more: Any) -> dict[str, Any]:
    made = {"setting": f"{policy}@8", "policy": policy, "width": 8, "problem": problem, "seed": 0, "is_right": is_right}
    made |= dict(zip(("model", "data", "prm", "max_tokens", "temperature"), group, strict=True))
    made |= {"is_right_strict": False, "answer": "1", "completion_tokens": 10, "seconds": 1.0, "cpu_seconds": 2.0}
    return made | more


def test_every_policy_is_asked_beside_greedy_and_all_choose_by_one_rule() -> None:
    asked = settings(8, list(POLICIES))
    assert [setting.key for setting in asked] == ["greedy@8", *(f"{name}@8" for name in POLICIES)]
    assert not asked[0].search
    rules = [{name: setting.search[name] for name in ("answer", "early_stop")} for setting in asked[1:]]
    assert rules == [{"answer": "weighted_majority", "early_stop": "off"}] * len(POLICIES)
    by_name = {setting.key.removesuffix("@8"): setting.search for setting in asked[1:]}
    assert by_name["ets published"]["preset"] == "paper"
    assert all(own.items() <= by_name[name].items() for name, own in tune.candidates()), (
        "as `sglang-ets tune` names them"
    )


def test_without_a_prm_the_model_judges_itself() -> None:
    args = argparse.Namespace(
        model_path="/a/model", prm_model_path=None, prm_format="judge", dtype="bfloat16", max_tokens=9, temperature=1.0, seed=0
    )  # fmt: skip
    assert "--prm-model-path" not in flags(args) and Case.of(args).group("x") == ("model", "x", "judge", 9, 1.0)
    args.prm_model_path = "/b/prm"
    assert flags(args)[flags(args).index("--prm-model-path") + 1] == "/b/prm"
    assert Case.of(args).prm == "prm, judge"


def test_the_summary_compares_kv_and_tokens_and_counts_disagreement() -> None:
    done = [
        row("rebase", "a", True, kv_tokens_mean=100, clusters=None, **KV),
        row("ets", "a", False, kv_tokens_mean=50, clusters=3.0, **KV, cpu_seconds=4.0),
        row("self_consistency", "a", False, answer=None),
    ]
    text, by_title = summary(done, seed=0)
    (of_title,) = by_title.values()
    assert {line["policy"]: line.get("kv_reduction") for line in of_title[1]} == {
        "rebase": 1.0,
        "ets": 2.0,
        "self_consistency": None,
    }
    assert "## qwen, gsm8k, judge, 224 tokens, temperature 1" in text
    assert "| rebase | 8 | 100.0 | 200.0 | 8.0 | 7.0 |  | 20.0 | 10.0 | 5.0 | 4.0 | 2.0 | 1/1 | 1/1 |" in text
    assert "| ets | 8 | 50.0 | 200.0 | 8.0 | 7.0 | 3.0 | 20.0 | 10.0 | 5.0 | 4.0 | 4.0 | 1/1 | 0/1 |" in text
    assert "| self_consistency | 8 |  |  |  |  |  |  | 10.0 |  |  | 2.0 | 0/1 | 0/1 |" in text
    assert "Not dominated at width 8, from the least KV: ets, rebase" in text


def test_a_table_has_only_problems_that_all_policies_of_a_width_have_solved() -> None:
    done = [row("rebase", name, True, kv_tokens_mean=100, clusters=None, **KV) for name in "ab"]
    done.append(row("ets", "a", True, kv_tokens_mean=50, clusters=3.0, **KV))
    assert "1/1" in summary(done, seed=0)[0] and "2/2" not in summary(done, seed=0)[0]


def test_models_data_sets_prms_and_limits_are_never_mixed() -> None:
    others = [
        CASE.group("math500"),
        Case("qwen", "head, token_classification", 224, 1.0, 0).group("gsm8k"),
        Case("other", "judge", 224, 1.0, 0).group("gsm8k"),
        Case("qwen", "judge", 512, 1.0, 0).group("gsm8k"),
        Case("qwen", "judge", 224, 0.7, 0).group("gsm8k"),
    ]
    done = [
        row(policy, "a", is_right, group, kv_tokens_mean=kv, clusters=None, **KV)
        for group, is_right in ((GSM8K, True), *((other, False) for other in others))
        for policy, kv in (("rebase", 90), ("dvts", 30))
    ]
    text, by_title = summary(done, seed=0)
    assert text.count("\n## ") + 1 == len(by_title) == 1 + len(others)
    accuracies = {title: {s["policy"]: s["accuracy"] for s in own} for title, (_, own) in by_title.items()}
    assert accuracies.pop(real_model.title(GSM8K)) == {"rebase": 1.0, "dvts": 1.0}
    assert list(accuracies.values()) == [{"rebase": 0.0, "dvts": 0.0}] * len(others)


def args_of(data: Path, **more: Any) -> argparse.Namespace:
    given = {
        "data": [str(data)], "model_path": "/x/qwen", "prm_model_path": None, "prm_format": "judge", "max_tokens": 224,
        "temperature": 1.0, "policies": ["rebase", "dvts"], "width": 8, "problems": 2, "in_flight": 2, "seed": 0,
        "validation": False, "together": False, "skip": 0, "embeddings": False, **more,
    }  # fmt: skip
    return argparse.Namespace(**given)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(f'{{"question": "{i} + {i}?", "answer": "{2 * i}"}}\n' for i in range(40)))
    return path


def names(args: argparse.Namespace, out: Path) -> list[tuple[str, list[str]]]:
    return [
        ("+".join(setting.name for setting in chosen), [problem.id for problem in batch])
        for _, chosen, batch in unsolved(args, out)
    ]


def test_a_run_goes_on_where_its_own_group_stopped(data: Path, tmp_path: Path) -> None:
    out, problems = tmp_path / "rows.jsonl", load(str(data), limit=2)
    here = CASE.group(data.name)
    elsewhere = [MATH, Case("qwen", "likelihood", 224, 1.0, 0).group(data.name)]
    for group in (here, *elsewhere):
        rows.append(out, row("rebase", problems[0].id, False, group))
    for group in elsewhere:
        rows.append(out, row("dvts", problems[0].id, False, group))
    first, second = (problem.id for problem in problems)
    both = [first, second]
    assert names(args_of(data), out) == [("greedy", both), ("rebase", [second]), ("dvts", both)]
    assert names(args_of(data, in_flight=1), out)[:3] == [("greedy", [first]), ("dvts", [first]), ("greedy", [second])]
    assert names(args_of(data, together=True), out) == [("greedy", both), ("rebase+dvts", both)]


def test_problems_for_choosing_settings_are_others_under_another_name(data: Path, tmp_path: Path) -> None:
    reported = unsolved(args_of(data, problems=40), tmp_path / "none")
    chosen_on = unsolved(args_of(data, problems=40, validation=True), tmp_path / "none")
    ids = [{problem.id for _, _, batch in todo for problem in batch} for todo in (reported, chosen_on)]
    assert len(ids[0]) + len(ids[1]) == 40 and not ids[0] & ids[1]
    assert {name for name, _, _ in chosen_on} == {"gsm8k.jsonl, validation"}
    fewer = {one.id for _, _, batch in unsolved(args_of(data, problems=40, skip=3), tmp_path / "none") for one in batch}
    assert fewer == {problem.id for problem in load(str(data))[3:]}


def test_embeddings_come_only_when_asked_for() -> None:
    plain, whole = (settings(8, ["rebase"], embeddings=wanted)[1].search for wanted in (False, True))
    assert whole.items() - plain.items() == {("return_embeddings", True)}


class Server:
    """A server that took so many CPU seconds, read twice."""

    url = "http://127.0.0.1:1"

    def __init__(self, *cpu_s: float) -> None:
        self._cpu_s: Iterator[float] = iter(cpu_s)

    def cpu_s(self) -> float:
        return next(self._cpu_s)


def searched_row(name: str) -> dict[str, Any]:
    """A row of `sglang-ets run`: three trajectories, two of which say 5."""
    texts = {1: "Step.\n\n", 2: r"\boxed{5}", 3: r"So \boxed{7}", 4: r"\boxed{5}"}
    nodes = [node(1, 0, 5, 6), node(2, 1, 7), node(3, 1, 8), node(4, 1, 9)]
    nodes[0]["state"] = "retained"
    for one in nodes:
        one |= {"text": texts[one["id"]], "depth": 1 + bool(one["parent"]), "score": 0.5, "finish": "step"}
    figures = {**dict.fromkeys((*real_model.FROM_SEARCH, "tokens_computed"), 3), "solver": {"fallbacks": 0}}
    return {
        "problem": name, "answer": "7", "is_right": False, "is_right_strict": False, "timed_out": False, "expected": "5",
        "search": json.dumps(settings(3, ["best_of_n"])[1].search), "seconds": 9.0, "usage": {"completion_tokens": 5},
        "search_result": {**figures, "tree": {"nodes": nodes}},
    }  # fmt: skip


def test_one_setting_shares_its_time_and_several_wait_each_for_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = iter([100.0, 106.0, 200.0, 206.0])
    monkeypatch.setattr("bench.real_model.time.perf_counter", lambda: next(clock))

    def run(_client: Any, jobs: Sequence[Any], out: Path, in_flight: int, _judge: Any) -> Iterator[tuple[int, int]]:
        assert in_flight == len(jobs)
        made = [searched_row(problem.id) | {"search": asked.search} for asked, problem in reversed(jobs)]
        out.write_text("".join(json.dumps(one) + "\n" for one in made))
        yield len(jobs), len(jobs)

    monkeypatch.setattr(real_model.runs, "run", run)
    problems, (_, best_of_n) = [Problem(name, "", "5") for name in "ab"], settings(3, ["best_of_n"])
    server = cast(Any, Server(10.0, 14.0, 20.0, 24.0))
    done = solve_together(server, [best_of_n], CASE, problems, MathProcess())
    assert [(one["setting"], one["problem"], one["answer"], one["is_right"]) for one in done] == [
        ("best_of_n@3", "a", "7", False),
        ("self_consistency@3", "a", "5", True),
        ("best_of_n@3", "b", "7", False),
        ("self_consistency@3", "b", "5", True),
    ]
    assert {(one["in_flight"], one["seconds"], one["cpu_seconds"]) for one in done} == {(2, 3.0, 2.0)}
    trees = tmp_path / "trees.jsonl"
    keep = partial(real_model.save_trees, trees, "gsm8k")
    both = solve_together(server, settings(3, ["best_of_n", "ets"])[1:], CASE, problems, MathProcess(), keep)
    kept = list(runs.rows_in(trees))
    assert len(kept) == 4 and {one["data"] for one in kept} == {"gsm8k"}
    assert all(one["search_result"]["tree"]["nodes"] for one in kept), "the studies need whole trees"
    assert {one["setting"] for one in both} == {"best_of_n@3", "self_consistency@3", "ets@3"} and len(both) == 6
    assert {(one["in_flight"], one["seconds"], "cpu_seconds" in one) for one in both} == {(4, 9.0, False)}


def test_a_row_keeps_figures_and_no_texts() -> None:
    kept = figures_of(searched_row("a"))
    assert (kept["completion_tokens"], kept["tokens_computed"], kept["step_tokens"]) == (5, 3, 1.25)
    assert kept["leaves"] == 2.0 and "tree" not in kept and "text" not in kept
    assert voted(searched_row("a"), MathProcess())["answer"] == "5"


def test_cpu_time_and_tokens_are_means_over_problems() -> None:
    done = [row("greedy", "a", False, cpu_seconds=1.0), row("greedy", "b", False, cpu_seconds=4.0)]
    assert "| 10.0 |  |  | 2.5 | 2/2 |" in cost_table(done)


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


def test_the_rows_of_this_repository_make_their_tables() -> None:
    done = list(rows.read(rows.RESULTS / "real_model.jsonl"))
    assert done and not [one for one in done if "/" in one["data"] or "/" in one["model"]]
    text, _ = summary(done, seed=0)
    assert (rows.RESULTS / "real_model.md").read_text(encoding="utf-8") == text + "\n"
