"""Tables of `throughput.py`, from its rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from bench import rows
from bench.embedded import EMBEDDED

Row = dict[str, Any]
Setting = tuple[str, int, str, int, int]
SETTING = ["model", "width", "algorithm", "in flight", "servers with search"]
PARTS = ("generate", "score", "encode", "select", "other")


def rounds_of(done: Sequence[Row]) -> dict[Setting, list[dict[str, Row]]]:
    """Rounds that all three systems have done, by setting: system -> row. A client is compared with every number of servers."""
    by_setting: dict[Setting, dict[int, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    every = {row.get("replicas", 1) for row in done if row["system"] != "client"}
    for row in done:
        for count in every if row["system"] == "client" else {row.get("replicas", 1)}:
            setting = (row.get("model", EMBEDDED), row["width"], row["algorithm"], row["in_flight"], count)
            by_setting[setting][row["round"]][row["system"]] = row
    complete = {
        setting: [systems for _, systems in sorted(by_round.items()) if len(systems) == 3]
        for setting, by_round in sorted(by_setting.items())
    }
    return {setting: kept for setting, kept in complete.items() if kept}


def rate(row: Row, counted: str = "problems") -> float:
    """Of problems or tokens, per second."""
    return float(row[counted] / row["seconds"])


def tables(done: Sequence[Row]) -> str:
    """Three markdown tables: problems per second, tokens per second against sampling, the client's time by part."""
    settings = rounds_of(done)
    return "\n\n".join([_problems(settings), _tokens(settings), _parts(settings)])


def _problems(settings: dict[Setting, list[dict[str, Row]]]) -> str:
    header = [*SETTING, "rounds", "problems"]
    header += ["in scheduler (problems/s)", "client (problems/s)", "ratio (min to max)"]
    header += ["CPU s/problem: in scheduler, client", "CPU ratio", "right: in scheduler, client"]
    cells = []
    for setting, rounds in settings.items():
        ours, theirs = ([systems[name] for systems in rounds] for name in ("in_scheduler", "client"))
        cpu = [[row["cpu_s"] / row["problems"] for row in side] for side in (ours, theirs)]
        right = [f"{sum(row['right'] for row in side)}" for side in (ours, theirs)]
        cells.append([
            *setting, len(rounds), sum(row["problems"] for row in ours),
            statistics.median(map(rate, ours)), statistics.median(map(rate, theirs)),
            _ratios(ours, theirs, rate),
            f"{statistics.median(cpu[0]):.2f}, {statistics.median(cpu[1]):.2f}",
            f"{statistics.median(b / a for a, b in zip(*cpu, strict=True)):.2f}x", ", ".join(right),
        ])  # fmt: skip
    return rows.markdown(header, cells)


def _tokens(settings: dict[Setting, list[dict[str, Row]]]) -> str:
    header = [*SETTING, "search (tokens/s)", "plain sampling (tokens/s)", "kept (min to max)",
              "tokens/CPU s: search, sampling", "kept by CPU"]  # fmt: skip
    cells = []
    for setting, rounds in settings.items():
        ours, plain = ([systems[name] for systems in rounds] for name in ("in_scheduler", "sampling"))
        by_cpu = [[row["completion_tokens"] / row["cpu_s"] for row in side] for side in (ours, plain)]
        cells.append([
            *setting,
            f"{statistics.median(rate(row, 'completion_tokens') for row in ours):.0f}",
            f"{statistics.median(rate(row, 'completion_tokens') for row in plain):.0f}",
            _ratios(ours, plain, lambda row: rate(row, "completion_tokens"), percent=True),
            f"{statistics.median(by_cpu[0]):.0f}, {statistics.median(by_cpu[1]):.0f}",
            f"{100 * statistics.median(a / b for a, b in zip(*by_cpu, strict=True)):.0f} %",
        ])  # fmt: skip
    return rows.markdown(header, cells)


def _parts(settings: dict[Setting, list[dict[str, Row]]]) -> str:
    header = [*SETTING, "client: s/problem in its thread", *(f"{part} (share)" for part in PARTS)]
    cells = []
    for setting, rounds in settings.items():
        mean = {part: statistics.fmean(systems["client"][f"{part}_s"] for systems in rounds) for part in PARTS}
        total = sum(mean.values())
        shares = [f"{mean[part]:.2f} ({100 * mean[part] / total:.0f} %)" for part in PARTS]
        cells.append([*setting, f"{total:.2f}", *shares])
    return rows.markdown(header, cells)


def _ratios(ours: Sequence[Row], theirs: Sequence[Row], value: Callable[[Row], float], percent: bool = False) -> str:
    """Median of the ratios within rounds, with the least and the greatest."""
    ratios = [value(a) / value(b) for a, b in zip(ours, theirs, strict=True)]
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    if percent:
        return f"{100 * middle:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"
