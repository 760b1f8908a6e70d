"""`python -m sglang_ets.launch_server`: sglang's server with search.

With no `--model-path` it serves the embedded models, on a CPU without any other flag. Flags that are given win over the
choices made here, which are printed.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What imports of torch and sglang make stays; to look through it again and again is a third of their time. `main` switches the
# collector on when they are done, and in a process that the server has spawned the plugin does. A user's script has its own.
if __name__ in ("__main__", "__mp_main__"):
    gc.disable()

from sglang_ets import cpu_shim

cpu_shim.install()  # at module level: spawned children import this module before anything of sglang

from sglang_ets.prm.choose import WITHOUT_PRM  # noqa: E402

MODELS = Path(__file__).parent / "models"
EMBEDDED = {
    "--model-path": str(MODELS / "policy"),
    "--prm-model-path": str(MODELS / "prm"),
    "--served-model-name": "sglang-ets-embedded",
    "--search-step-delimiter": r"\n",
    "--search-max-step-tokens": "64",
    "--search-max-tokens": "512",
    "--search-answer-pattern": "the_answer_is",
    "--search-answer": "weighted_majority",
}
# Chosen on validation problems of the embedded task, whose PRM is nearly always right and whose steps mean the same or do not.
EMBEDDED_WEIGHTS = {"--search-coverage": "reward", "--search-cluster-distance": "0.3"}
# Room for four searches of width 64 with 350 tokens a trajectory even if they shared nothing; some 360 MB a model.
EMBEDDED_CPU = {"--dtype": "float32", "--max-total-tokens": "90000", "--prm-max-total-tokens": "90000"}
CPU = {"--device": "cpu", "--attention-backend": "torch_native"}
# Two models take turns on few cores, so there is nothing to overlap; and an idle scheduler would spin on one of the cores.
CPU_SWITCHES = ("--disable-overlap-schedule", "--sleep-on-idle")
THREADS = "1"  # for models of a few MB more threads only wait for each other
ALIASES = {"--model-path": ("--model-path", "--model")}


def chosen_flags(argv: Sequence[str], has_cuda: bool) -> list[str]:
    """What we add in front of the user's flags: nothing that the user has set."""
    chosen: dict[str, str] = {"--search": "ets"}
    switches: tuple[str, ...] = ()
    is_embedded = not is_given(argv, "--model-path") and not is_given(argv, "--config")
    if is_embedded:
        chosen |= EMBEDDED | (EMBEDDED_WEIGHTS if value_of(argv, "--search-preset") in (None, "default") else {})
    if any(item.removeprefix("--prm-format=") in WITHOUT_PRM for item in argv):
        chosen.pop("--prm-model-path", None)
    if not has_cuda:
        chosen |= CPU | (EMBEDDED_CPU if is_embedded else {})
        switches = CPU_SWITCHES
    if is_embedded:
        switches += ("--skip-server-warmup",)
    flags = [item for name, value in chosen.items() if not is_given(argv, name) for item in (name, value)]
    return flags + [name for name in switches if not is_given(argv, name)]


def is_given(argv: Sequence[str], flag: str) -> bool:
    """Whether the command line sets the flag, as `--flag value` or `--flag=value`."""
    names = ALIASES.get(flag, (flag,))
    return any(item == name or item.startswith(f"{name}=") for item in argv for name in names)


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """What the command line sets the flag to, at its last occurrence; None if it does not."""
    value = None
    for item, following in zip(argv, [*argv[1:], ""], strict=False):
        if item == flag:
            value = following
        elif item.startswith(f"{flag}="):
            value = item.removeprefix(f"{flag}=")
    return value


def print_choices(flags: Sequence[str], has_cuda: bool) -> None:
    """Say what was chosen, before sglang's own log begins."""
    where = (
        "a CUDA device" if has_cuda else f"the CPU with {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s) a process"
    )
    models = "the embedded models" if EMBEDDED["--model-path"] in flags else "the models given"
    print(f"sglang-ets: serving {models} on {where}", file=sys.stderr)
    print(f"sglang-ets: added flags: {' '.join(flags) or 'none'}", file=sys.stderr, flush=True)


def prepared(argv: Sequence[str]) -> Any:
    """sglang's server arguments for this command line and what we add to it; patches are in effect then.

    Raises:
        SystemExit: a flag is wrong, sglang is not the pinned version, or the plugin was not loaded.
    """
    import torch

    has_cuda = torch.cuda.is_available() and not cpu_shim.is_cpu_asked_for(argv)
    flags = chosen_flags(argv, has_cuda)
    if not has_cuda:
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        if EMBEDDED["--model-path"] in flags:
            os.environ.setdefault("OMP_NUM_THREADS", THREADS)
    if "-h" not in argv and "--help" not in argv:
        print_choices(flags, has_cuda)

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    from sglang_ets import plugin

    load_plugins()
    if not plugin.is_registered():
        raise SystemExit(
            "sglang has not loaded the plugin sglang_ets; install this package (pip install .) and see that the "
            "environment variable SGLANG_PLUGINS does not leave it out"
        )
    return prepare_server_args([*flags, *argv])


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until stopped. Without `argv`, the flags of the command line.

    Raises:
        SystemExit: see `prepared`.
    """
    server_args = prepared(sys.argv[1:] if argv is None else argv)

    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    gc.enable()
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
        gc.freeze()  # else the end of the interpreter is three seconds of looking for garbage in all of torch and sglang


if __name__ == "__main__":
    main()
