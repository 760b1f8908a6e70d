"""Accuracy against KV: search policies on the embedded task, with a strong or a weak PRM. Five grids of settings:

    kv_footprint   every policy and both ways to cover, on held-out problems
    sweep          both weights of ETS on validation problems; the chosen pair and the plain policies on held-out ones
    coverage       ETS with and without its coverage term, as published and by reward, on validation problems
    cuts           distances at which steps become one cluster
    stopping       searches that may end before their last trajectory, against the same searches that may not

    python -m bench.searches --smoke                                      all grids, a minute or two
    python -m bench.searches --grid kv_footprint --widths 16 64 --problems 200
    python -m bench.searches --grid sweep --problems 100 --test-problems 400 --servers 2
    python -m bench.searches --grid coverage --prm weak
    python -m bench.searches --grid sweep --tables                        from the rows that are there

In a name `b` is `kv_cost_weight`, `d` `diversity_weight` (0 covers nothing, as `ets_kv`). `ets` covers by reward, `ets uniform`
by the published term, `ets published` by that term on embeddings as they are, with the published cut. Greedy decoding and
self-consistency are ordinary requests to the same server. The strong PRM is the shipped one; the weak one is the policy model,
judging the probability of its own results: it is sure of its own mistakes.

One problem under one setting is a row; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import openai
from tqdm import tqdm

from bench import figures, rows, tables
from bench.embedded import MODELS, client_of, held_out_problems
from bench.redundancy import redundancy
from bench.server import Places, running_server
from bench.testbed.task import distinct_problems
from bench.trees import grow

ANSWER = re.compile(r"The answer is (-?\d+)")
MAX_TOKENS = 512
FROM_SEARCH = ("kv_tokens_mean", "kv_tokens_peak", "kv_retained_mean", "kv_referenced_mean", "prm_tokens", "levels")
FROM_SOLVER = ("fallbacks", "loop_blocked_ms_max", "level_loop_ms_mean", "level_loop_ms_max")
PUBLISHED = {"coverage": "uniform", "cluster_distance": 0.05, "center_embeddings": False}
TOLERANCE = 0.01  # of accuracy, below REBASE, for weights that are chosen
LIKELY = (0.95, 0.8)  # probabilities at which an answer is taken for final
PLAIN = ("best_of_n", "dvts", tables.BASELINE)
SEARCHES = ("best_of_n", "beam", "dvts", "dora", "particles", "subpool", tables.BASELINE)

Split = Literal["validation", "test"]
Problem = Mapping[str, Any]  # prompt and answer


@dataclass(frozen=True)
class Setting:
    """A policy and what it is asked for."""

    name: str
    width: int
    search: Mapping[str, Any]

    @property
    def key(self) -> str:
        return f"{self.name}@{self.width}"


@dataclass(frozen=True)
class Grid:
    """What one experiment compares, and on which problems. The command line replaces any field but the first two."""

    settings: Callable[[Grid], list[Setting]]
    split: Split
    problems: int
    widths: tuple[int, ...] = (16,)
    kv_weights: tuple[float, ...] = (1.0, 2.0, 4.0)
    diversity_weights: tuple[float, ...] = ()
    cuts: tuple[float, ...] = ()
    test_problems: int = 0  # that the chosen weights see afterwards


def plain(names: Sequence[str], width: int) -> list[Setting]:
    """Policies without weights."""
    return [Setting(name, width, {"algorithm": name}) for name in names]


def ets(name: str, width: int, kv_weight: float, **search: Any) -> Setting:
    return Setting(name, width, {"algorithm": "ets", "coverage": "reward", "kv_cost_weight": kv_weight, **search})


def footprint_settings(grid: Grid) -> list[Setting]:
    """Greedy once; per width self-consistency, the plain policies and ETS at each cost weight."""
    made = [Setting("greedy", 1, {})]
    for width in grid.widths:
        made += [Setting("self_consistency", width, {}), *plain(SEARCHES, width)]
        for b in grid.kv_weights:
            made.append(Setting(f"ets_kv b={b:g}", width, {"algorithm": "ets_kv", "kv_cost_weight": b}))
            made.append(ets(f"ets b={b:g}", width, b))
            made.append(ets(f"ets uniform b={b:g}", width, b, coverage="uniform"))
    return made


def sweep_settings(grid: Grid) -> list[Setting]:
    """The plain policies, and ETS at every pair of weights."""
    made = [setting for width in grid.widths for setting in plain(PLAIN, width)]
    for width, b, d in product(grid.widths, grid.kv_weights, grid.diversity_weights):
        made.append(ets(f"ets b={b:g} d={d:g}", width, b, diversity_weight=d))
    return made


def coverage_settings(grid: Grid) -> list[Setting]:
    """The plain policies, and at each cost weight ETS as published with every diversity weight, and by reward."""
    made = [setting for width in grid.widths for setting in plain(PLAIN, width)]
    for width, b in product(grid.widths, grid.kv_weights):
        for d in grid.diversity_weights:
            name = f"ets published b={b:g} d={d:g}" if d else f"ets b={b:g} d=0"
            made.append(ets(name, width, b, diversity_weight=d, **PUBLISHED))
        made.append(ets(f"ets b={b:g}", width, b))
    return made


def cut_settings(grid: Grid) -> list[Setting]:
    """ETS at weights that keep most of a level, with every cut."""
    pairs = product(grid.widths, grid.kv_weights, grid.cuts)
    return [
        ets(f"ets b={b:g} d=1.5 cut={cut:g}", width, b, diversity_weight=1.5, cluster_distance=cut)
        for width, b, cut in pairs
    ]


def stopping_settings(grid: Grid) -> list[Setting]:
    """Policies that may not end early, that end when the answer is settled, and when it is likely by each probability."""
    stops: dict[str, dict[str, Any]] = {"off": {}, "settled": {"early_stop": "settled"}}
    stops |= {f"likely {p:g}": {"early_stop": "likely", "early_stop_probability": p} for p in LIKELY}
    made = []
    for width in grid.widths:
        for policy, (stop, more) in product(
            (*plain(("best_of_n", "rebase"), width), ets("ets b=4", width, 4.0)), stops.items()
        ):
            made.append(replace(policy, name=f"{policy.name}, {stop}", search={**policy.search, **more}))
    return made


GRIDS = {
    "kv_footprint": Grid(footprint_settings, "test", 200, widths=(16, 64)),
    "sweep": Grid(
        sweep_settings, "validation", 100,
        kv_weights=(0.5, 1.0, 2.0, 4.0), diversity_weights=(0.0, 1.0, 2.0, 4.0), test_problems=400,
    ),
    "coverage": Grid(coverage_settings, "validation", 100, diversity_weights=(0.0, 1.5)),
    "cuts": Grid(cut_settings, "test", 40, kv_weights=(1.0,), cuts=(0.1, 0.2, 0.3, 0.4, 0.6)),
    "stopping": Grid(stopping_settings, "test", 60),
}  # fmt: skip
SMOKE: dict[str, Any] = {
    "problems": 2, "widths": (8,), "kv_weights": (1.0,), "diversity_weights": (0.0, 1.5), "cuts": (0.2, 0.3),
}  # fmt: skip


def problems_of(split: Split, count: int, seed: int) -> list[Problem]:
    """The first problems of a split; those to be tested on are the shipped ones."""
    if split == "validation":
        return [{"prompt": p.prompt, "answer": p.answer} for p in distinct_problems(split, count, seed)]
    return list(held_out_problems(count))


def solve(client: openai.OpenAI, setting: Setting, problem: Problem, seed: int) -> rows.Row:
    """One problem under one setting: is the answer right, and what did it cost."""
    started = time.perf_counter()
    prompt, fields = problem["prompt"], {"max_tokens": MAX_TOKENS, "seed": seed}
    if setting.search:
        response = grow(client, prompt, setting.width, {"early_stop": "off", **setting.search}, **fields)
        figures = response.search
        answer = _answer(response.choices[0].text)
        cost = {key: figures[key] for key in FROM_SEARCH} | {key: figures["solver"][key] for key in FROM_SOLVER}
        cost |= asdict(redundancy(figures["tree"]["nodes"]))
    else:
        fields |= {"n": setting.width, "temperature": float(setting.width > 1)}
        response = client.completions.create(model="default", prompt=prompt, **fields)
        votes = Counter(voted for choice in response.choices if (voted := _answer(choice.text)) is not None)
        answer = votes.most_common(1)[0][0] if votes else None
        cost = {}
    return {
        "setting": setting.key, "policy": setting.name, "width": setting.width, "problem": prompt, "seed": seed,
        "answer": answer, "is_right": answer == str(problem["answer"]),
        "completion_tokens": response.usage.completion_tokens if response.usage else 0,
        "latency_s": time.perf_counter() - started, **cost,
    }  # fmt: skip


def _answer(text: str) -> str | None:
    answers = ANSWER.findall(text)
    return answers[-1] if answers else None


@dataclass(frozen=True)
class Runner:
    """Solves problems on servers that share one PRM, `in_flight` at a time on each."""

    clients: Sequence[openai.OpenAI]
    in_flight: int
    prm: str
    seed: int

    def run(self, settings: Sequence[Setting], split: Split, count: int, out: Path) -> None:
        """Append a row for each setting and problem that has none, problem by problem, so that equal sets are compared.

        `seconds` of a row is a run's share of its server's time: its latency over the number of runs in flight there.
        """
        same = {"split": split, "prm": self.prm, "seed": self.seed}
        known = {(row["setting"], row.get("problem")) for row in rows.read(out) if same.items() <= row.items()}
        jobs = product(problems_of(split, count, self.seed), settings)
        todo = [(setting, problem) for problem, setting in jobs if (setting.key, problem["prompt"]) not in known]
        places = Places(self.clients, self.in_flight * len(self.clients))

        def solved(job: tuple[Setting, Problem]) -> rows.Row:
            with places.lent() as client:
                row = solve(client, *job, self.seed)
            return row | {"in_flight": self.in_flight, "seconds": row["latency_s"] / self.in_flight, **same}

        with ThreadPoolExecutor(self.in_flight * len(self.clients)) as pool:
            try:
                for row in tqdm(pool.map(solved, todo), total=len(todo), unit="run"):
                    rows.append(out, row)
            finally:
                pool.shutdown(cancel_futures=True)  # when interrupted: end what runs, forget what waits


@contextmanager
def runner(args: argparse.Namespace) -> Iterator[Runner]:
    """Of the server at `--url`, or of `--servers` new ones."""
    with ExitStack() as stack:
        prm = MODELS / "prm" if args.prm == "strong" else weak_prm(Path(stack.enter_context(TemporaryDirectory())))
        flags = ("--search", "ets", "--prm-model-path", str(prm))
        urls = [args.url] if args.url else [stack.enter_context(running_server(flags)) for _ in range(args.servers)]
        clients = [client_of(url) for url in urls]
        yield Runner(clients, args.in_flight, args.prm, args.seed)


def weak_prm(folder: Path) -> Path:
    """The policy model in the format of the shipped PRM."""
    for file in (MODELS / "policy").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "prm_config.json").write_bytes((MODELS / "prm" / "prm_config.json").read_bytes())
    return folder


def chosen(summaries: Sequence[rows.Row]) -> str:
    """The ETS policy of the least KV among those as accurate as REBASE, within `TOLERANCE`; else the most accurate one."""
    base = next(s["accuracy"] for s in summaries if s["policy"] == tables.BASELINE)
    tuned = [s for s in summaries if s["policy"].startswith("ets ")]
    good = [s for s in tuned if s["accuracy"] >= base - TOLERANCE]
    best = min(good, key=lambda s: s["kv_tokens_mean"]) if good else max(tuned, key=lambda s: s["accuracy"])
    return str(best["policy"])


def run_grid(grid: Grid, on: Runner, out: Path) -> None:
    """All settings on the problems of the grid; then, on held-out ones, the plain policies and the weights chosen."""
    settings = grid.settings(grid)
    on.run(settings, grid.split, grid.problems, out)
    if grid.test_problems:
        done = [row for row in rows.read(out) if (row["split"], row["prm"]) == (grid.split, on.prm)]
        name = chosen(tables.table(done, on.seed)[1])
        print(f"chosen on {grid.split} problems: {name}")
        on.run([s for s in settings if s.name in (*PLAIN, name)], "test", grid.test_problems, out)


def cut_table(done: Sequence[rows.Row]) -> str:
    """Clusters of each cut beside the distinct meanings, which are known here.

    A row may hold the means of several problems; these are left out once there are rows of single ones.
    """
    own = [row for row in done if "problem" in row] or done
    names = ("leaves", "distinct_texts", "distinct_meanings", "clusters", "purity", "kv_tokens_mean", "is_right")
    header = ["cut", "leaves", "distinct texts", "distinct meanings", "clusters", "purity", "KV held (mean)", "right"]
    cells = []
    for policy in sorted({row["policy"] for row in own}):
        of_cut = [(row, row.get("problems", 1)) for row in own if row["policy"] == policy]
        count = sum(problems for _, problems in of_cut)
        *means, purity, held, right = (sum((row[name] or 0) * n for row, n in of_cut) / count for name in names)
        cells.append([
            policy.rsplit("=")[-1], *(f"{mean:.1f}" for mean in means), f"{purity:.3f}", f"{held:.0f}",
            f"{right * count:.0f}/{count}",
        ])  # fmt: skip
    return rows.markdown(header, cells)


def stopping_table(done: Sequence[rows.Row]) -> str:
    """Each way to end early beside the same searches, problem by problem, that go on to the last trajectory."""
    by_policy: dict[tuple[int, str, str], dict[str, rows.Row]] = {}
    for row in done:
        policy, stop = row["policy"].split(", ")
        by_policy.setdefault((row["width"], policy, stop), {})[row["problem"]] = row
    cells = []
    for (width, policy, stop), rows_of in sorted(by_policy.items()):
        whole = by_policy[width, policy, "off"]
        pairs = [(row, whole[problem]) for problem, row in rows_of.items() if problem in whole]
        changed = sum(row["answer"] != of_whole["answer"] for row, of_whole in pairs)
        saved = {
            name: 1 - sum(row[name] for row, _ in pairs) / sum(of_whole[name] for _, of_whole in pairs)
            for name in ("completion_tokens", "levels", "seconds")
        }
        right = f"{sum(row['is_right'] for row, _ in pairs)}/{len(pairs)}"
        shares = [f"{share:.1%}" for share in saved.values()]
        cells.append([width, policy, stop, right, f"{changed}/{len(pairs)}", *shares])
    header = "width, policy, `early_stop`, right, answers changed, tokens saved, levels saved, time saved"
    return rows.markdown(header.split(", "), cells)


OWN_TABLES = {"cuts": cut_table, "stopping": stopping_table}


def report(name: str, done: Sequence[rows.Row], seed: int, picture: Path | None = None) -> str:
    """The tables of a grid's rows; with `picture`, accuracy against KV is drawn there."""
    if name in OWN_TABLES:
        return OWN_TABLES[name](done)
    parts = tables.by_title(done, seed)
    if picture:
        figures.accuracy_against_kv(tables.by_title(done, seed, shared=False), picture)
    made = [f"{title}\n\n{text}" for title, (text, _) in parts.items()]
    if name == "kv_footprint":
        made += [tables.equal_cost_tables(summaries) for _, summaries in parts.values()]
    return "\n\n".join(made)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, help="default: kv_footprint, or all with --smoke")
    parser.add_argument("--prm", choices=["strong", "weak"], default="strong")
    parser.add_argument("--problems", type=int)
    parser.add_argument("--test-problems", type=int, help="of a sweep, for the weights it has chosen")
    parser.add_argument("--widths", type=int, nargs="+")
    for option in ("--kv-weights", "--diversity-weights", "--cuts"):
        parser.add_argument(option, type=float, nargs="+")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="by names in the table; default: all policies")
    parser.add_argument("--url", help="a running server; default: start some with the embedded models")
    parser.add_argument("--servers", type=int, default=1, help="to start, for more cores; they share the runs")
    parser.add_argument("--in-flight", type=int, default=4, help="at each server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", action="store_true", help="run nothing, write tables and plot of the rows anew")
    rows.add_arguments(parser, "two problems at width 8")
    return parser.parse_args(argv)


def grid_of(name: str, args: argparse.Namespace) -> Grid:
    """A grid with what the command line gives."""
    grid = GRIDS[name]
    if args.smoke:
        grid = replace(grid, **SMOKE, test_problems=2 if grid.test_problems else 0)
    names = ("problems", "test_problems", "widths", "kv_weights", "diversity_weights", "cuts")
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    grid = replace(grid, **given)
    if not args.only:
        return grid
    every = grid.settings
    return replace(grid, settings=lambda own: [setting for setting in every(own) if setting.name in args.only])


def main() -> None:
    args = parsed()
    names = [args.grid] if args.grid else list(GRIDS) if args.smoke else ["kv_footprint"]
    outs = {name: rows.out_of(args, name) for name in names}
    if not args.tables:
        with runner(args) as on:
            for name, out in outs.items():
                run_grid(grid_of(name, args), on, out)
    for name, out in outs.items():
        done = [row for row in rows.read(out) if row["seed"] == args.seed]
        rows.publish(out, report(name, done, args.seed, out.with_suffix(".png")))


if __name__ == "__main__":
    main()
