"""The bench of forks: what counts as an equal tree, what must be computed at least, and its table."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import forks, rows
from bench.trees import growth, num_distinct_prefixes
from sglang_ets.tools.datasets import load


def node(place: int, parent: int, *token_ids: int) -> dict[str, Any]:
    return {
        "id": place, "parent": parent, "token_ids": list(token_ids), "state": "complete", "allocation": 0, "cluster": None,
        "text": str(place),
    }  # fmt: skip


TREE = [node(1, 0, 5, 6), node(2, 0, 5, 7), node(3, 1, 8), node(4, 1, 8), node(5, 2, 8)]


def test_equal_beginnings_count_once_and_equal_steps_behind_other_ones_do_not() -> None:
    assert num_distinct_prefixes(TREE) == len([(5,), (5, 6), (5, 7), (5, 6, 8), (5, 7, 8)])


def test_a_tree_is_equal_by_what_grew_and_not_by_how_it_is_shown() -> None:
    assert growth(TREE) == growth([{**one, "text": "another"} for one in TREE])
    assert growth(TREE) != growth([*TREE[:-1], node(5, 2, 9)])


@pytest.mark.parametrize("other", [None, "shared", "speculate"])
def test_a_mode_that_grows_another_tree_ends_the_bench(
    other: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @contextmanager
    def running(_flags: Sequence[Sequence[str]]) -> Iterator[list[Any]]:
        yield list(forks.MODES)

    def measure(server: Any, *_asked: Any) -> tuple[dict[str, Any], list[Any]]:
        figures = {"seconds": 2.0 if server == "extend" else 1.0, "cpu_s": 1.0, "problems": 1}
        figures |= {"completion_tokens": 10, "tokens_computed": 5 if server == "shared" else 10, "distinct_prefixes": 5}
        return figures, growth(TREE[:-1] if server == other else TREE)

    monkeypatch.setattr(forks, "running", running)
    monkeypatch.setattr(forks, "measure", measure)
    args = argparse.Namespace(
        widths=[8], in_flight=[1], problems=1, rounds=1, seed=0, modes=list(forks.MODES), policies=list(forks.POLICIES),
        model_path=None, max_tokens=512,
    )  # fmt: skip
    out = tmp_path / "rows.jsonl"
    if other:
        with pytest.raises(SystemExit, match=re.escape(f"{' '.join(forks.MODES[other])} grew other trees")):
            forks.run(args, out)
        return
    forks.run(args, out)
    made = list(rows.read(out))
    assert len(made) == len(forks.MODES) * len(forks.POLICIES)
    assert "| embedded | 8 | 1 | ets b=4 | shared | 1 | 1 | 2.00x | 1.00x | 0.50 | 1.00 |" in forks.table(made)


def test_the_table_says_how_many_guesses_were_used_and_what_the_others_cost() -> None:
    rounds = [{"children": 3, "children_used": 2, "tokens_wasted": 5, "tokens_computed": 100} for _ in range(2)]
    assert forks.guesses_of(rounds) == "67% of 6; 5.0%"
    assert forks.guesses_of([{"tokens_computed": 100}]) == ""


def test_a_model_of_ones_own_is_asked_in_chats_about_problems_left_for_validation(tmp_path: Path) -> None:
    data = tmp_path / "set.jsonl"
    data.write_text("".join(f'{{"question": "{i} + {i}?", "answer": "{2 * i}"}}\n' for i in range(40)))
    args = argparse.Namespace(
        model_path="/a/model", prm_format="judge", dtype="bfloat16", data=str(data), max_tokens=64
    )
    task = forks.Task.of(args)
    assert (task.model, task.is_chat, task.max_tokens) == ("model", True, 64)
    assert list(task.prompts) == [problem.prompt for problem in load(str(data), split="validation")] != []
    assert task.flags[task.flags.index("--model-path") + 1] == "/a/model"


def test_tables_never_mix_models() -> None:
    base = {"width": 4, "in_flight": 1, "policy": "rebase", "round": 0, "cpu_s": 1.0, "problems": 1}
    base |= {"completion_tokens": 10, "tokens_computed": 5, "distinct_prefixes": 5}
    made = [
        {**base, **model, "mode": mode, "seconds": seconds}
        for model, factor in (({}, 1.0), ({"model": "another"}, 10.0))
        for mode, seconds in (("extend", 2 * factor), ("shared", factor))
    ]
    text = forks.table(made)
    assert "| embedded | 4 | 1 | rebase | shared | 1 | 1 | 2.00x" in text
    assert "| another | 4 | 1 | rebase | shared | 1 | 10 | 2.00x" in text
