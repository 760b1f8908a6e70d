"""`sglang-ets COMMAND`: the server and the tools beside it. Nothing heavy is imported before a command is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

SERVER = "sglang_ets.launch_server"
# Name: the module whose `main` takes the rest of the command line, and what it does.
COMMANDS = {
    "serve": (SERVER, "start sglang's server with search; takes all of its flags"),
    "ask": ("sglang_ets.tools.ask", "solve one problem on a running server and watch the search"),
    "view": ("sglang_ets.api.view", "write a returned search tree as one HTML page"),
    "run": ("sglang_ets.tools.run", "solve the problems of a data set on a running server"),
    "evaluate": ("sglang_ets.tools.evaluate", "accuracy of a run by how answers are chosen, from its saved trees"),
    "import-yaml": (
        "sglang_ets.tools.import_yaml",
        "say which commands do what a parameter file of ETS or REBASE asks for",
    ),
    "compare": ("sglang_ets.tools.compare", "write two searches of one problem as one HTML page"),
    "top": ("sglang_ets.tools.top", "watch the searches of a running server"),
    "tune": ("sglang_ets.tools.tune", "say how hard a model and its PRM let ETS prune, from saved searches"),
    "calibrate": ("sglang_ets.tools.calibrate", "suggest a cluster cut for a PRM"),
    "plan": ("sglang_ets.tools.plan", "say which searches fit on a card"),
}


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(
        prog="sglang-ets",
        description="PRM-guided tree search inside the SGLang scheduler.",
        epilog="Flags without a command start the server: sglang-ets --model-path M is sglang-ets serve --model-path M.",
    )
    commands = main_parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    return main_parser


def serve(flags: Sequence[str]) -> None:
    """Become the server. Does not return.

    A process of its own kind instead of a call: sglang's workers import the main module of their parent again, and
    that has to be the launcher, which prepares them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *flags])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Without `argv`, the one of the command line.

    Raises:
        SystemExit: as the command does; 2 for a command that does not exist.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["serve", *argv]
    args = parser().parse_args(argv[:1])
    module, _ = COMMANDS[args.command]
    if module == SERVER:
        serve(argv[1:])
        return
    importlib.import_module(module).main(argv[1:])


if __name__ == "__main__":
    main()
