"""See it work: held-out problems solved by three search policies on a server of its own.

make demo                          or: python -m bench.demo --problems 12 --width 16

Once the server is up, this is `sglang-ets run --data embedded`.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from bench.server import running_server
from sglang_ets.tools import run

POLICIES = ("best_of_n", "rebase", "ets")
MAX_TOKENS = 512
IN_FLIGHT = 2
NEXT = (
    "right: share of the problems whose answer has the right value; strictly: the same by a stricter look at its text; "
    "KV held: tokens of the policy model's KV that a search holds, mean over its levels; tokens and seconds: of one problem."
    "\n\n"
    "Next: `make serve` keeps such a server running; meanwhile, in another terminal, this asks it one question:\n\n"
    '    .venv/bin/sglang-ets ask "7*8-2*(3+4)="'
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--width", type=int, default=16)
    args = parser.parse_args()
    console = Console()
    with ExitStack() as stack:
        with console.status("starting the server") as status:
            passing = lambda seconds: status.update(f"starting the server, {seconds:.0f} s")  # noqa: E731
            url = stack.enter_context(running_server(["--search", "ets"], waiting=passing))
        out = Path(stack.enter_context(TemporaryDirectory())) / "demo.jsonl"
        asked = {
            "data": run.EMBEDDED, "limit": args.problems, "width": args.width, "temperature": 1.0,
            "max-tokens": MAX_TOKENS, "in-flight": IN_FLIGHT, "base-url": url, "out": out,
        }  # fmt: skip
        run.main([*(f"--{name}={value}" for name, value in asked.items()), "--algorithm", *POLICIES])
    console.print(NEXT, highlight=False)


if __name__ == "__main__":
    main()
