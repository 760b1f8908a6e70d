"""Hooks on sglang's command line: the `--search` group of flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sglang_ets.patches.record import Patch

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


WHY = "none: the flags are ours"
WHEN = "sglang lets plugins declare flags"

PATCHES: tuple[Patch, ...] = (
    Patch(
        f"{SERVER_ARGS}.add_cli_args",
        "after",
        "sglang_ets.patches.server_args:add_flags",
        "8d5f9b207365f5bad13d4623477aa017145dc67a98499441daf0eb84412c5a9e",
        "the flags of the search appear beside sglang's own, in `--help` too",
        WHY,
        WHEN,
        "loaded",
    ),
    Patch(
        f"{SERVER_ARGS}.from_cli_args",
        "around",
        "sglang_ets.patches.server_args:keep_flags",
        "32152825e268b6da4218b27ab4f654c3230474a12af0cd4b2a9c4e6c588be0f2",
        "sglang copies only its own fields, so the flags travel to the scheduler as `server_args._ets`",
        WHY,
        WHEN,
        "loaded",
    ),
)
