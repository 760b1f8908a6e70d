"""Hooks on sglang's command line: the `--search` group of flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sglang_ets.patches.record import Patch, Use

from sglang_ets import flags

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"


def add_flags(result: Any, *args: Any, **kwargs: Any) -> Any:
    for parser in (*args, *kwargs.values()):
        if isinstance(parser, argparse.ArgumentParser):
            flags.add_flags(parser)
    return result


def keep_flags(original: Callable[..., Any], cls: type, namespace: argparse.Namespace) -> Any:
    from sglang_ets.plugin import switch_on

    server_args = original(cls, namespace)
    server_args._ets = flags.from_namespace(namespace)
    return switch_on(server_args)


UPSTREAM = "none: the flags are ours"
GOES_WHEN = "sglang lets plugins declare flags"

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{SERVER_ARGS}.add_cli_args",
        kind="after",
        hook="sglang_ets.patches.server_args:add_flags",
        parameters=("parser",),
        tested=("d3b50a305bcc39ce",),
        why="the flags of the search appear beside sglang's own, in `--help` too",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        condition="loaded",
    ),
    Patch(
        target=f"{SERVER_ARGS}.from_cli_args",
        kind="around",
        hook="sglang_ets.patches.server_args:keep_flags",
        parameters=("cls", "args"),
        tested=("4ce4f3e45552dd41",),
        why="sglang copies only its own fields, so the flags travel to the scheduler as `server_args._ets`",
        upstream=UPSTREAM,
        remove_when=GOES_WHEN,
        condition="loaded",
        uses=(Use(f"{SERVER_ARGS}.__setattr__", ("name", "value")), Use(f"{SERVER_ARGS}.__reduce__")),
    ),
)
