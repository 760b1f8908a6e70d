"""Where the time of a search goes: a sampling profile of the scheduler process while one search after another is solved.

    python -m bench.profile --smoke
    python -m bench.profile --width 64 --policy "ets b=4" --seconds 60

py-spy stops the process two hundred times a second and writes down the stack of its main thread. "The search's own Python" is
what hooks and coordinator do themselves, not what they call a model for. The table goes to bench/results/profile.txt.

One search at a time by default: with more in flight the steps of one hide behind those of others.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

import psutil

from bench import rows
from bench.client_search.processes import Running, awake, running
from bench.forks import POLICIES, Task, solve

RATE = 200  # samples a second
SCHEDULER = "sglang::scheduler"  # how sglang names the process
# Area -> parts of a frame, "function (file:line)", that say a stack belongs to it. The first area that matches has it.
AREAS: dict[str, tuple[str, ...]] = {
    "the PRM: forward passes and readout": ("sglang_ets/prm/",),
    "selection and answers": ("sglang_ets/core/selection.py", "sglang_ets/core/ilp.py", "sglang_ets/core/answer.py"),
    "planning of the attention": ("sglang_ets/core/attention_plan.py", "sglang_ets/engine/tree_plan.py"),
    "attention over the tree": ("patches/torch_native.py", "kernels/paged_attention.py", "engine/tree_attention.py"),
    "the policy model without attention": ("ModelRunner.forward (",),
    "sampling": ("ModelRunner.sample (",),
}
OWN, SCHEDULER_CODE, OTHER = "the search's own Python", "sglang's scheduler", "other"
OURS = ("sglang_ets/", "patches/")
# Hooks that call what they wrap.
AROUND = ("run_strands (", "run_batch (sglang_ets", "draw_for_members (", "plan_with_forks (")
SGLANG = ("(scheduler.py", "(tp_worker.py", "(batch_result_processor.py", "(schedule_batch.py", "(schedule_policy.py")


def area_of(stack: str) -> str:
    """The area that a folded stack, outermost frame first, belongs to.

    What is in none of `AREAS` belongs to the innermost of its frames that is the search's or the scheduler's: hooks around
    a function of sglang stand in the stack of all that it does.
    """
    for area, parts in AREAS.items():
        if any(part in stack for part in parts):
            return area
    for frame in reversed(stack.split(";")):
        if any(part in frame for part in SGLANG):
            return SCHEDULER_CODE
        if any(part in frame for part in OURS) and not frame.startswith(AROUND):
            return OWN
    return OTHER


def samples(folded: str) -> dict[str, Counter[str]]:
    """Thread -> stack -> samples, from py-spy's raw format: "thread (..);frame;frame COUNT" a line."""
    by_thread: dict[str, Counter[str]] = {}
    for line in folded.splitlines():
        stack, count = line.rsplit(" ", 1)
        thread, _, frames = stack.partition(";")
        by_thread.setdefault(thread, Counter())[frames] += int(count)
    return by_thread


def shares(stacks: Counter[str]) -> list[tuple[str, float]]:
    """Each area's share of one thread's samples, largest first."""
    total = sum(stacks.values())
    by_area = Counter[str]()
    for stack, count in stacks.items():
        by_area[area_of(stack)] += count
    return [(area, count / total) for area, count in by_area.most_common()]


def innermost_of_us(stacks: Counter[str], most: int = 12) -> list[tuple[str, float]]:
    """The functions of this project in which its own Python spends most samples, with their share of the thread."""
    total = sum(stacks.values())
    by_function = Counter[str]()
    for stack, count in stacks.items():
        if area_of(stack) == OWN:
            ours = [frame for frame in stack.split(";") if any(part in frame for part in OURS)]
            by_function[ours[-1].rsplit(":", 1)[0] + ")"] += count
    return [(function, count / total) for function, count in by_function.most_common(most)]


def record(process: psutil.Process, seconds: int, out: Path) -> None:
    """Write the folded stacks of one process.

    Raises:
        subprocess.CalledProcessError: py-spy may not look into the process (it needs the right to trace it).
    """
    files = distribution("py-spy").files or ()
    tool = next(path.locate() for path in files if path.name == "py-spy")
    options = {"pid": process.pid, "duration": seconds, "rate": RATE, "format": "raw", "output": out}
    flags = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([tool, "record", "--threads", *flags], check=True, capture_output=True)


def measure(server: Running, args: argparse.Namespace) -> tuple[str, list[float]]:
    """The folded stacks of the scheduler, and the seconds that each search took meanwhile."""
    scheduler = next(one for one in server.processes if one.name().startswith(SCHEDULER[:15]))
    task, is_over = Task.embedded(), threading.Event()
    prompts, asked = itertools.cycle(task.prompts), (args.policy, args.width, args.seed)

    def keep_solving() -> list[float]:
        latencies_s = []
        while not is_over.is_set():
            latencies_s.append(solve(server.url, task, next(prompts), *asked)[1])
        return latencies_s

    with awake([server]), ThreadPoolExecutor(args.in_flight) as pool, tempfile.TemporaryDirectory() as folder:
        solve(server.url, task, task.prompts[-1], *asked)  # compiles and loads; not measured
        clients = [pool.submit(keep_solving) for _ in range(args.in_flight)]
        try:
            record(scheduler, args.seconds, out := Path(folder) / "stacks.txt")
        finally:
            is_over.set()
        return out.read_text(encoding="utf-8"), [latency for client in clients for latency in client.result()]


def report(folded: str, latencies_s: Sequence[float]) -> str:
    """The profile as text."""
    main = next(stacks for thread, stacks in samples(folded).items() if thread.endswith("MainThread"))
    lines = [
        f"searches: {len(latencies_s)}, seconds each (mean): {statistics.fmean(latencies_s):.2f}",
        f"samples of the scheduler's main thread: {main.total()} at {RATE} a second",
        "",
        *(f"{share:6.1%}  {area}" for area, share in shares(main)),
        "",
        "the search's own Python, by its innermost function:",
        *(f"{share:6.1%}  {function}" for function, share in innermost_of_us(main)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--policy", choices=POLICIES, default="ets b=4")
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "three seconds at width 8")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.seconds = 8, 3
    out = rows.out_of(args, "profile").with_suffix(".txt")
    with running([Task.embedded().flags]) as servers:
        folded, latencies_s = measure(servers[0], args)
    made_by = rows.provenance()
    head = f"{made_by['command']}\n{made_by['commit']}, {made_by['hardware']}\n\n"
    text = head + report(folded, latencies_s)
    out.write_text(text, encoding="utf-8")
    if args.smoke or args.out:
        out.with_suffix(".folded").write_text(folded, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
