"""Tables of accuracy against cost: made of hand-written rows, so that every figure can be worked out."""

from __future__ import annotations

from typing import Any

import pytest

from bench.tables import against, equal_cost_tables, frontier, interval, reduced, reduction_interval, table


def row(policy: str, problem: str, is_right: bool, held: float, width: int = 16, **more: Any) -> dict[str, Any]:
    cost = {"kv_tokens_mean": held, "kv_tokens_peak": 2 * held, "kv_referenced_mean": held}
    cost |= {"prm_tokens": 5, "levels": 3}
    made = {"setting": f"{policy}@{width}", "policy": policy, "width": width, "problem": problem, "is_right": is_right}
    return made | {"completion_tokens": 100 * width, "seconds": 1.0, "seed": 0} | cost | more


def summary(
    policy: str, width: int, accuracy: float, held: float | None, tokens: float, seconds: float
) -> dict[str, Any]:
    made = {"policy": policy, "width": width, "accuracy": accuracy, "completion_tokens": tokens, "seconds": seconds}
    return made if held is None else made | {"kv_tokens_mean": held}


def test_a_table_compares_the_problems_that_all_policies_of_a_width_have_solved() -> None:
    done = [
        row("rebase", "a", True, 100),
        row("rebase", "b", True, 300),
        row("rebase", "c", False, 900),
        row("ets", "a", True, 50),
        row("ets", "b", False, 50),
        row("ets", "a", True, 50, width=64),  # another width is another comparison
    ]
    text, (ets, base, wide) = table(done, seed=0)
    assert (base["problems"], base["accuracy"], base["kv_tokens_mean"], base["kv_reduction"]) == (2, 1.0, 200, 1)
    assert (ets["accuracy"], ets["difference"], ets["kv_reduction"]) == (0.5, -0.5, 4)
    assert "difference" not in base and "kv_reduction" not in wide
    assert "| ets | 16 | 2 | 0.500 | -0.500 [-1.000, +0.000] | 50 | 100 | 4.00x [2.00, 6.00] |" in text
    assert (reduced(base), reduced(wide)) == ("1.00x", "")


def test_a_policy_on_all_its_problems_is_compared_on_those_of_rebase() -> None:
    done = [
        row("rebase", "a", True, 100),
        row("rebase", "b", False, 300),
        row("ets", "b", True, 50),
        row("ets", "c", False, 10),
        row("dvts", "a", False, 100),
    ]
    _, (dvts, ets, base) = table(done, seed=0, shared=False)
    assert [s["problems"] for s in (dvts, ets, base)] == [1, 2, 2]
    assert (ets["accuracy"], ets["difference"], ets["kv_reduction"]) == (0.5, 1.0, 6.0)
    assert (dvts["difference"], dvts["kv_reduction"]) == (-1.0, 1.0)


def test_one_policy_against_the_others_on_the_problems_of_all() -> None:
    done = [
        *(row("ets", problem, True, 50) for problem in "abc"),
        *(row("dvts", problem, problem == "a", 100) for problem in "ab"),
        *(row("rebase", problem, True, held) for problem, held in zip("abd", (100, 300, 5), strict=True)),
    ]
    *_, dvts, base = against(done, "ets", seed=0).splitlines()
    assert dvts == "| dvts | 2 | +0.500 [+0.000, +1.000] | 2.00x [2.00, 2.00] |"
    assert base == "| rebase | 2 | +0.000 [+0.000, +0.000] | 4.00x [2.00, 6.00] |"


def test_what_leaves_repeat_stands_beside_the_kv() -> None:
    seen = {"leaves": 8.0, "distinct_texts": 6.0, "distinct_meanings": 3.0}
    done = [
        row("ets", "a", True, 50, clusters=2.0, **seen),
        row("ets", "b", True, 50, clusters=None, **(seen | {"leaves": 7.0})),
        row("rebase", "a", True, 50, clusters=None, **seen),
        row("rebase", "b", True, 50, clusters=None, **seen),
    ]
    text, (ets, base) = table(done, seed=0)
    assert (ets["repeated"], base["repeated"]) == ("7.5: 6.0, 3.0, 2.0", "8.0: 6.0, 3.0, -")
    assert "| 7.5: 6.0, 3.0, 2.0 |" in text


def test_an_interval_is_of_paired_differences() -> None:
    assert interval([True, False] * 50, [True, False] * 50, seed=0) == (0, 0)
    low, high = interval([True] * 60 + [False] * 40, [False] * 20 + [True] * 40 + [False] * 40, seed=0)
    assert 0.10 < low < 0.2 < high < 0.30
    assert interval([True, False], [False, True], seed=1) == interval([True, False], [False, True], seed=1)


def test_the_interval_of_a_reduction_is_of_the_ratio_of_sums() -> None:
    assert reduction_interval([50.0] * 9, [100.0] * 9, seed=0) == (2.0, 2.0)
    low, high = reduction_interval([50.0] * 100, [100.0, 300.0] * 50, seed=0)
    assert 3.5 < low < 4 < high < 4.5  # the mean of 100 draws of 100 or 300 is 200 +- 20 (95 %)


def test_the_frontier_has_what_nothing_dominates() -> None:
    points = [("a", 100, 0.5), ("b", 90, 0.6), ("c", 200, 0.6), ("d", 300, 0.7), ("e", 90, 0.4)]
    made = [summary(name, 16, accuracy, held, 1, 1) for name, held, accuracy in points]
    plain = summary("self_consistency", 16, 0.9, None, 1, 1)  # holds no KV that is counted
    assert [s["policy"] for s in frontier([*made, plain])] == ["b", "d"]


def test_accuracy_at_equal_cost_is_interpolated_on_its_logarithm_and_never_beyond_what_was_seen() -> None:
    made = [
        summary("rebase", 16, 0.6, 1, 1000, 2.0),
        summary("rebase", 64, 0.8, 1, 4000, 8.0),
        summary("vote", 16, 0.5, None, 500, 1.0),
        summary("vote", 64, 0.7, None, 2000, 4.0),
        summary("greedy", 1, 0.4, None, 100, 0.5),
    ]
    tokens, seconds = equal_cost_tables(made).split("\n\n")
    assert tokens.splitlines()[0] == "| accuracy at equal tokens generated | 1000 | 4000 |"
    assert "| rebase | 0.600 | 0.800 |" in tokens
    assert "| vote | 0.600 |  |" in tokens  # half way from 500 to 2000 in logarithms; 4000 was never spent
    assert "greedy" not in tokens
    assert "| vote | 0.600 |  |" in seconds


@pytest.mark.parametrize("accuracies", [(0.5, 0.5), (0.5, 0.7)])
def test_of_equal_kv_the_more_accurate_is_on_the_frontier(accuracies: tuple[float, float]) -> None:
    made = [summary(f"p{at}", 16, accuracy, 100, 1, 1) for at, accuracy in enumerate(accuracies)]
    assert [s["accuracy"] for s in frontier(made)] == [max(accuracies)]


def test_a_cost_that_some_rows_do_not_know_is_left_out() -> None:
    known = [
        {"policy": "rebase", "width": width, "completion_tokens": 10.0 * width, "seconds": 1.0 * width, "accuracy": 0.5}
        for width in (4, 16)
    ]
    assert "seconds a problem" in equal_cost_tables(known)
    waited = [{name: value for name, value in known[0].items() if name != "seconds"}, known[1]]
    shown = equal_cost_tables(waited)
    assert "tokens generated" in shown and "seconds a problem" not in shown
