"""`sglang-ets import-yaml ets_16_math500.yaml`: the commands for what a parameter file of ETS or REBASE asks for.

Prints how to start the server and how to run the problems; with `--run` the problems are run on a server that is there.
docs/from-ets.md has every key.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from sglang_ets.core.settings import shown
from sglang_ets.tools import run
from sglang_ets.tools.ask import DEFAULT_URL, EXIT_BAD_INPUT

ALGORITHMS = {"softmax_costmodel": "ets", "softmax": "rebase", "beam_search": "beam", "dvts": "dvts"}
# By `reward_model_type` and `policy_model_type`: how the PRM reads steps, and where a step ends.
PRM_FORMATS = {"llemma": "llemma", "mistral": "math_shepherd", "llama": "rlhflow"}
DELIMITERS = {"llemma": "ки", "mistral": "ки", "llama": "\n\n"}
# Their key -> our setting of a search.
RENAMED = {
    "softmax_temperature": "rebase_temperature",
    "max_step_tokens": "max_step_tokens",
    "lambdac": "kv_cost_weight",
    "lambdas": "diversity_weight",
}
OTHERS = ("temperature", "max_tokens", "select_method", "num_threads", "store_path", "width", "fixedwidth")
KEYS = (*RENAMED, *OTHERS, "reward_model_type", "policy_model_type")
TREE_FILE = "run.jsonl"


@dataclass(frozen=True)
class Imported:
    """What a parameter file means here."""

    serve: tuple[str, ...]  # arguments of `sglang-ets serve`
    run: tuple[str, ...]  # arguments of `sglang-ets run`
    notes: tuple[str, ...]  # what has no counterpart, a sentence each


def read(path: Path) -> dict[str, Any]:
    """The parameters of a file.

    Raises:
        ValueError: it is no YAML object, or has a key that neither repository knows.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} must be YAML ({' '.join(str(error).split())})") from None
    unknown = [key for key in values if key not in KEYS] if isinstance(values, dict) else [shown(values)]
    if unknown:
        raise ValueError(f"{path.name} must have keys among {', '.join(KEYS)}, got {', '.join(map(str, unknown))}")
    return dict(values)


def imported(values: Mapping[str, Any], data: str, base_url: str) -> Imported:
    """The commands for these parameters.

    Raises:
        ValueError: a method or a model type that has no counterpart.
    """
    method = values.get("select_method", "softmax")
    if method not in ALGORITHMS:
        raise ValueError(f"select_method must be one of {', '.join(ALGORITHMS)}, got {method!r}")
    algorithm = ALGORITHMS[method]
    notes = []
    settings = {ours: values[theirs] for theirs, ours in RENAMED.items() if theirs in values}
    if algorithm != "ets":
        settings = {name: value for name, value in settings.items() if "weight" not in name}
    elif not values.get("lambdas", 0):
        algorithm = "ets_kv"
        settings.pop("diversity_weight", None)
    if algorithm in ("ets", "ets_kv") and not values.get("lambdac", 0):
        notes.append("lambdac 0 was +1e-4 there, a small reward for every node that is kept; here it is 0")
    if values.get("fixedwidth", -1) > 0:
        notes.append("fixedwidth has no counterpart: beams and subtrees are the square root of the width, rounded up")
    policy_type, reward_type = values.get("policy_model_type", "llemma"), values.get("reward_model_type", "llemma")
    for key, value, known in (
        ("policy_model_type", policy_type, DELIMITERS),
        ("reward_model_type", reward_type, PRM_FORMATS),
    ):
        if value not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {value!r}")
    serve = (
        *("--search", algorithm, "--model-path", "POLICY", "--prm-model-path", "PRM"),
        *("--prm-format", PRM_FORMATS[reward_type]),
    )
    settings |= {"step_delimiter": DELIMITERS[policy_type]}
    if policy_type != "llama":
        settings["answer_pattern"] = "the_answer_is"  # those models were trained to end so
    whole = ("--data", data, "--split", "all")
    ran = (*whole, "--algorithm", algorithm, *_run_flags(values, settings, policy_type == "llama"))
    return Imported(serve, ran if base_url == DEFAULT_URL else (*ran, "--base-url", base_url), tuple(notes))


def _run_flags(values: Mapping[str, Any], settings: Mapping[str, Any], is_chat: bool) -> Iterator[str]:
    yield from ("--width", str(values.get("width", 16)), "--set", "preset=paper")
    for name, value in settings.items():
        is_plain = isinstance(value, str) and value.isprintable()
        yield from ("--set", f"{name}={value if is_plain else json.dumps(value)}")
    if not is_chat:
        yield "--completion"
    for flag, key in (("--temperature", "temperature"), ("--max-tokens", "max_tokens"), ("--in-flight", "num_threads")):
        if key in values:
            yield from (flag, str(values[key]))
    if "store_path" in values:
        yield from ("--out", str(Path(values["store_path"]) / TREE_FILE))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the commands, or run them. Exits with 2 after one sentence for a file that cannot be read."""
    made = argparse.ArgumentParser(
        prog="sglang-ets import-yaml", description="Parameter files of ETS and REBASE, as commands here."
    )
    made.add_argument("files", type=Path, nargs="+", help="for example hype-parameters/ets_16_math500.yaml")
    made.add_argument("--data", default="math500", help="as for `sglang-ets run` (default math500)")
    made.add_argument("--base-url", default=DEFAULT_URL, help=f"of the server (default {DEFAULT_URL})")
    made.add_argument("--limit", type=int, help="problems at most")
    made.add_argument(
        "--run", action="store_true", help="run the problems of each file on the server, one file after the other"
    )
    args = made.parse_args(arguments)
    try:
        files = [imported(read(path), args.data, args.base_url) for path in args.files]
    except (ValueError, OSError) as error:
        print(f"sglang-ets import-yaml: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error
    for path, one in zip(args.files, files, strict=True):
        command = [*one.run, *(["--limit", str(args.limit)] if args.limit else [])]
        print(f"# {path}")
        for note in one.notes:
            print(f"# {note}")
        print(f"sglang-ets serve {shlex.join(one.serve)}")
        print(f"sglang-ets run {shlex.join(command)}", flush=True)
        if args.run:
            Path(command[command.index("--out") + 1] if "--out" in command else TREE_FILE).parent.mkdir(
                parents=True, exist_ok=True
            )
            run.main(command)
