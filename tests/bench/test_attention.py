"""The attention bench times equal results only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import attention


@pytest.mark.parametrize("case", attention.SMOKE, ids=lambda case: f"{case.new_tokens} new")
def test_a_case_times_both_sides(case: attention.Case) -> None:
    row = attention.measure(case, repetitions=2)
    assert row["ratio"] == row["stock_ms"] / row["ours_ms"]
    assert f"| embedded | 8 | 60 | {case.new_tokens} |" in attention.table([row])


def test_siblings_share_the_pages_of_their_prefix() -> None:
    case = attention.SMOKE[0]
    pages = attention.inputs(case)[4][1:]
    first, sibling, cousin = (
        set(pages[0].tolist()),
        set(pages[1].tolist()),
        set(pages[attention.SIBLINGS].tolist()),
    )
    assert len(first & sibling) == case.kv_tokens - case.kv_tokens // 5
    assert not first & cousin


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "decode", lambda original, backend, *args, **kwargs: torch.zeros_like(args[1]))
    with pytest.raises(RuntimeError, match="from the stock result"):
        attention.measure(attention.SMOKE[0], repetitions=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tree_is_timed_with_its_plan_and_without(dtype: str, tmp_path: Path) -> None:
    case = replace(attention.SMOKE_TREES[0], dtype=dtype, shared_tokens=100)
    row = attention.measure_tree(case, repetitions=2)
    assert row["plan_mib"] < row["kernel_mib"]
    assert f"| embedded | {dtype} | 100 | 8 |" in attention.tree_table([row])
    attention.plot_trees([row], tmp_path / "tree.png")
    assert (tmp_path / "tree.png").stat().st_size > 0


def test_a_plan_that_changes_a_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "paged_attention", lambda batch: batch.output.normal_())
    with pytest.raises(RuntimeError, match="the plan changes the result"):
        attention.measure_tree(attention.SMOKE_TREES[0], repetitions=1)
