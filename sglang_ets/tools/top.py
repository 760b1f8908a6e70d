"""`sglang-ets top`: what a running server's searches do right now, once a second, from `/server_info` and `/metrics`."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sglang_ets.tools.ask import DEFAULT_URL, EXIT_FAILED
from sglang_ets.tools.run import console_of

TIMEOUT_S = 10.0
MOST_SEARCHES = 20  # shown; what is taller than a terminal could not be drawn over
# Of `/metrics`, without `_total`: name, how it is shown, and whether its rate is meant.
SHOWN = (
    ("sglang:num_running_reqs", "requests running", False),
    ("sglang:num_queue_reqs", "requests waiting", False),
    ("sglang:token_usage", "policy pool in use, share", False),
    ("sglang_ets_generated_tokens", "tokens/s of searches", True),
    ("sglang_ets_prm_tokens", "tokens/s of the PRM", True),
    ("sglang_ets_searches", "searches/s ended", True),
)


@dataclass(frozen=True)
class Sample:
    """The server at one time."""

    at_s: float
    pool_tokens: int
    ranks: tuple[Mapping[str, Any], ...]  # `search` of each scheduler that answers
    metrics: Mapping[str, float] | None  # summed over labels; None: the server was started without --enable-metrics


def sample(url: str) -> Sample:
    """Ask the server.

    Raises:
        ValueError: no server, or one without search; one sentence.
    """
    info = json.loads(_get(f"{url}/server_info") or "{}")
    ranks = tuple(state["search"] for state in info.get("internal_states", []) if "search" in state)
    if not ranks:
        raise ValueError(f"the server at {url} has no search; start it with `sglang-ets serve`")
    text = _get(f"{url}/metrics", may_lack=True)
    return Sample(
        time.monotonic(), info.get("max_total_num_tokens") or 0, ranks, None if text is None else totals(text)
    )


def totals(text: str) -> dict[str, float]:
    """Sum of each counter and gauge over its labels, by the family's name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.type in ("counter", "gauge"):
            values = [one.value for one in family.samples if not one.name.endswith("_created")]
            sums[family.name] = sum(values)
    return sums


def _get(url: str, may_lack: bool = False) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        if may_lack:
            return None
        raise ValueError(f"{url} answered HTTP {error.code}; is it a server of `sglang-ets serve`?") from error
    except OSError as error:
        raise ValueError(f"no server answers at {url} ({error}); start one or give --base-url") from error


def view(now: Sample, before: Sample | None) -> Group:
    """What a person sees: counts, the two pools, rates since the last sample, and the oldest searches."""
    searches = [search for rank in now.ranks for search in rank["searches"]]
    counts = {
        name: sum(rank[name] for rank in now.ranks)
        for name in ("running", "suspended", "waiting", "steps_in_engine", "done", "failed")
    }
    lines = [Text("searches  " + "  ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))]
    held = sum(rank["held_kv_tokens"] for rank in now.ranks)
    prm = [rank["prm"] for rank in now.ranks]
    lines.append(_pool("policy KV", held, now.pool_tokens * len(now.ranks)))
    lines.append(_pool("PRM KV", sum(p["held_kv_tokens"] for p in prm), sum(p["pool_tokens"] for p in prm)))
    if now.metrics is None:
        lines.append(Text("no /metrics: start the server with --enable-metrics for rates", style="dim"))
    else:
        lines.append(Text("  ".join(_figures(now, before))))
    return Group(*lines, _table(searches))


def _pool(name: str, held: int, size: int) -> Text:
    share = held / size if size else 0.0
    bar = "#" * round(30 * share)
    return Text(f"{name:<9} [{bar:<30}] {held} of {size} tokens held by searches ({share:.0%})")


def _figures(now: Sample, before: Sample | None) -> list[str]:
    shown = []
    for name, label, is_rate in SHOWN:
        value = (now.metrics or {}).get(name)
        if value is None:
            continue
        if not is_rate:
            shown.append(f"{value:.3g} {label}")
        elif before is not None and before.metrics is not None:
            passed = max(now.at_s - before.at_s, 1e-9)
            shown.append(f"{(value - before.metrics.get(name, 0.0)) / passed:.3g} {label}")
    return shown


def _table(searches: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{len(searches)} searches, oldest first", title_justify="left")
    for name in ("id", "algorithm", "width", "levels", "steps", "KV held", "seconds"):
        table.add_column(name, justify="left" if name in ("id", "algorithm") else "right", no_wrap=True)
    for search in sorted(searches, key=lambda one: -one["seconds"])[:MOST_SEARCHES]:
        figures = (search[name] for name in ("width", "levels", "nodes_made", "held_kv_tokens"))
        cells = [str(search["id"])[:12], search["algorithm"], *map(str, figures), f"{search['seconds']:.1f}"]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Show until interrupted, or once. Exits with 1 after one sentence when the server does not answer."""
    made = argparse.ArgumentParser(prog="sglang-ets top", description="What a running server's searches do right now.")
    made.add_argument("--base-url", default=DEFAULT_URL, help=f"of the server (default {DEFAULT_URL})")
    made.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (default 1)")
    made.add_argument("--once", action="store_true", help="look once, for scripts")
    args = made.parse_args(arguments)
    url = args.base_url.rstrip("/").removesuffix("/v1")
    console = console_of()
    try:
        now = sample(url)
        if args.once:
            console.print(view(now, None))
            return
        with Live(view(now, None), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(args.interval)
                before, now = now, sample(url)
                live.update(view(now, before))
    except ValueError as error:
        print(f"sglang-ets top: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from error
    except KeyboardInterrupt:
        return
