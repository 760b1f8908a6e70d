"""Tables of accuracy against what a search costs, from rows of one problem under one setting each."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bench import rows

BASELINE = "rebase"
NUM_RESAMPLES = 2000
MEANS = ("kv_tokens_mean", "kv_tokens_peak", "kv_referenced_mean", "completion_tokens", "prm_tokens", "levels",
         "seconds")  # fmt: skip
REPEATED = ("leaves", "distinct_texts", "distinct_meanings", "clusters")
Cases = dict[str, dict[str, Any]]  # rows of one setting by problem
EQUAL = {"completion_tokens": "tokens generated", "seconds": "seconds a problem"}


def interval(right: list[bool], base: list[bool], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy difference, paired by problem."""
    draw = random.Random(seed)
    gains = [int(a) - int(b) for a, b in zip(right, base, strict=True)]
    means = sorted(sum(draw.choices(gains, k=len(gains))) / len(gains) for _ in range(NUM_RESAMPLES))
    return means[int(0.025 * NUM_RESAMPLES)], means[int(0.975 * NUM_RESAMPLES)]


def reduction_interval(held: list[float], base: list[float], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of all KV held by `base` to all KV held, paired by problem."""
    drawn = np.random.default_rng(seed).integers(len(held), size=(NUM_RESAMPLES, len(held)))
    ratios = np.array(base)[drawn].sum(1) / np.array(held)[drawn].sum(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def reduced(summary: dict[str, Any]) -> str:
    """KV reduction as a cell: the ratio and its interval, which the baseline itself has not."""
    if "kv_low" not in summary:
        return f"{summary['kv_reduction']:.2f}x" if "kv_reduction" in summary else ""
    return f"{summary['kv_reduction']:.2f}x [{summary['kv_low']:.2f}, {summary['kv_high']:.2f}]"


def differing(summary: dict[str, Any]) -> str:
    """Accuracy against the baseline as a cell: the difference and its interval."""
    return f"{summary['difference']:+.3f} [{summary['low']:+.3f}, {summary['high']:+.3f}]" if "low" in summary else ""


def table(done: list[dict[str, Any]], seed: int, shared: bool = True) -> tuple[str, list[dict[str, Any]]]:
    """A markdown table and one summary per setting, KV and accuracy against REBASE of the same width.

    All policies of a width are shown on the problems that all of them have solved; without `shared`, each on all of its own,
    of which those that REBASE has solved too are compared.
    """
    settings = by_setting(done, shared)
    summaries = [_summary(cases, settings, seed) for cases in settings.values() if cases]
    summaries.sort(key=lambda s: (s["width"], s["policy"]))
    header = ["policy", "width", "problems", "accuracy", "vs REBASE (95 %)", "KV mean", "KV peak", "KV reduction (95 %)",
              "leaves: texts, meanings, clusters", "tokens generated", "PRM tokens", "levels", "s/problem"]  # fmt: skip
    cells = [
        [
            s["policy"], s["width"], s["problems"], f"{s['accuracy']:.3f}", differing(s),
            s.get("kv_tokens_mean", ""), s.get("kv_tokens_peak", ""), reduced(s), s["repeated"],
            s["completion_tokens"], s.get("prm_tokens", ""), s.get("levels", ""), s.get("seconds", ""),
        ]
        for s in summaries
    ]  # fmt: skip
    return rows.markdown(header, cells), summaries


def against(done: list[dict[str, Any]], policy: str, seed: int) -> str:
    """One policy against each other one of its width, on the problems that all of them have solved: a markdown table."""
    by_policy = {next(iter(cases.values()))["policy"]: cases for cases in by_setting(done, shared=True).values()}
    own = by_policy.pop(policy)
    header = [f"{policy} against", "problems", "accuracy (95 %)", "KV reduction (95 %)"]
    cells = [
        [rival, len(own), differing(s), reduced(s)]
        for rival, s in ((rival, _compared(own, cases, seed)) for rival, cases in sorted(by_policy.items()))
    ]
    return rows.markdown(header, cells)


def by_title(done: Iterable[rows.Row], seed: int, shared: bool = True) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """`table` of the rows of each split and PRM, by a title that names both; validation problems first."""
    groups: dict[str, list[rows.Row]] = defaultdict(list)
    for row in done:
        if row["seed"] == seed:
            groups[f"{row['split']} problems, {row['prm']} PRM"].append(row)
    return {title: table(groups[title], seed, shared) for title in sorted(groups, reverse=True)}


def by_setting(done: list[dict[str, Any]], shared: bool) -> dict[str, Cases]:
    """The rows of each setting by problem; with `shared` only of problems that all settings of a width have solved."""
    settings: dict[str, Cases] = defaultdict(dict)
    for row in done:
        settings[row["setting"]][row["problem"]] = row
    for width in {row["width"] for row in done} if shared else ():
        same = [cases for cases in settings.values() if next(iter(cases.values()))["width"] == width]
        common = set.intersection(*(set(cases) for cases in same))
        for cases in same:
            for problem in set(cases) - common:
                del cases[problem]
    return settings


def _compared(cases: Cases, base: Cases, seed: int) -> dict[str, float]:
    """Accuracy and KV of two settings on the problems that both have solved; what they do not tell is left out."""
    shared = [problem for problem in cases if problem in base]
    if not shared:
        return {}
    has_kv = "kv_tokens_mean" in cases[shared[0]]
    if cases is base:
        return {"kv_reduction": 1.0} if has_kv else {}
    right, reference = ([side[problem]["is_right"] for problem in shared] for side in (cases, base))
    made = {"difference": (sum(right) - sum(reference)) / len(shared)}
    made["low"], made["high"] = interval(right, reference, seed)
    if has_kv:
        held, kept = ([side[problem]["kv_tokens_mean"] for problem in shared] for side in (cases, base))
        made["kv_reduction"] = sum(kept) / sum(held)
        made["kv_low"], made["kv_high"] = reduction_interval(held, kept, seed)
    return made


def _summary(cases: Cases, settings: dict[str, Cases], seed: int) -> dict[str, Any]:
    some = next(iter(cases.values()))
    mean = {key: sum(row[key] for row in cases.values()) / len(cases) for key in MEANS if key in some}
    made = {"policy": some["policy"], "width": some["width"], "problems": len(cases), **mean}
    made["repeated"] = _repeated(list(cases.values()))
    made["accuracy"] = sum(row["is_right"] for row in cases.values()) / len(cases)
    return made | _compared(cases, settings.get(f"{BASELINE}@{some['width']}", {}), seed)


def _repeated(done: Sequence[dict[str, Any]]) -> str:
    """How much the leaves of a level repeat each other, means over levels and problems; what is not known is a dash."""
    if "leaves" not in done[0]:
        return ""
    known = [[row[name] for row in done if row.get(name) is not None] for name in REPEATED]
    leaves, *distinct = (f"{np.mean(values):.1f}" if values else "-" for values in known)
    return f"{leaves}: {', '.join(distinct)}"


def frontier(summaries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The searches of one width that no other dominates: none holds less KV and is at least as accurate.

    In order of KV held; equals in both stay together.
    """
    searched = sorted(
        (s for s in summaries if "kv_tokens_mean" in s), key=lambda s: (s["kv_tokens_mean"], -s["accuracy"])
    )
    kept: list[dict[str, Any]] = []
    for s in searched:
        if not kept or s["accuracy"] > kept[-1]["accuracy"]:
            kept.append(s)
    return kept


def equal_cost_tables(summaries: Sequence[dict[str, Any]]) -> str:
    """Accuracy of every policy at what REBASE spends at each width: as many tokens generated, then as many seconds.

    A cost that is not known of all is left out.

    A policy's accuracy between two widths that were measured is interpolated on the logarithm of the cost; nothing is said
    beyond the least and the most that it was seen to spend.
    """
    known = [cost for cost in EQUAL if all(cost in summary for summary in summaries)]
    return "\n\n".join(_equal_cost_table(summaries, cost) for cost in known)


def _equal_cost_table(summaries: Sequence[dict[str, Any]], cost: str) -> str:
    budgets = {s["width"]: s[cost] for s in summaries if s["policy"] == BASELINE}
    by_policy: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for s in summaries:
        by_policy[s["policy"]].append((s[cost], s["accuracy"]))
    header = [f"accuracy at equal {EQUAL[cost]}", *(rows.figure(budgets[width]) for width in sorted(budgets))]
    cells = []
    for policy, points in sorted(by_policy.items()):
        costs, accuracies = np.array(sorted(points)).T
        interpolated = [
            np.interp(np.log(budgets[width]), np.log(costs), accuracies, np.nan, np.nan) for width in sorted(budgets)
        ]
        cells.append([policy, *("" if np.isnan(one) else f"{one:.3f}" for one in interpolated)])
    return rows.markdown(header, [line for line in cells if any(line[1:])])
