"""The `--search` group of command line flags, and the same settings as environment variables.

The values travel as one dict of scalars, `server_args._ets`, from the launcher to the API server and the schedulers.
Names that are also fields of `SearchConfig` are the server's defaults for requests that leave them out.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_ets.core import registry
from sglang_ets.core.config import MAX_WIDTH, SearchConfig
from sglang_ets.core.settings import Setting, settings_of
from sglang_ets.prm.choose import AUTO, NAMES, WITHOUT_PRM

OFF = "off"
MAX_KV_PRESSURE = 1e3
MAX_WAITING = 256  # searches
ENV_PREFIX = "SGLANG_ETS_"
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
SEARCH_ENV = f"{ENV_PREFIX}SEARCH"  # set for child processes, which learn from it whether to patch


@dataclass(frozen=True)
class Flag:
    """One flag: `--{name}` on the command line, `settings[key]` in the program. One of type bool takes no value."""

    name: str
    key: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] | None = None

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.removeprefix("search-").replace("-", "_").upper()

    def from_environment(self) -> Any:
        """What the environment says, else the default. A text is left to argparse, which applies the type to it.

        Raises:
            SystemExit: a switch has a value that is neither yes nor no.
        """
        text = os.environ.get(self.env)
        if text is None or self.type is not bool:
            return self.default if text is None else text
        if text.lower() not in YES + NO:
            raise SystemExit(f"{self.env} must be 1 or 0, got {text!r}; leave it out for {int(bool(self.default))}")
        return text.lower() in YES


ALLOW_UNTESTED = Flag(
    "allow-untested-sglang",
    "allow_untested_sglang",
    bool,
    False,
    "Warn, and do not stop, where sglang's code is of no tested version and every contract of the patches holds.",
)
POLICY = Flag(
    "search-policy",
    "search_policy",
    str,
    None,
    "Policies of your own: module:Class or file.py:Class, several with commas between them. Their names are algorithms.",
)
# Flags of the server itself. The rest sets defaults of requests: one for each setting of a search that says so.
SERVER_FLAGS = (
    Flag("search", "search", str, OFF, "Default algorithm of a search, of ours or your own; off: stock sglang."),
    POLICY,
    Flag("prm-model-path", "prm_model_path", str, None, "Process reward model: a folder or a name on the Hub."),
    Flag(
        "prm-format",
        "prm_format",
        str,
        "auto",
        "How the PRM reads steps and writes scores: auto, " + ", ".join(NAMES) + ".",
    ),
    Flag("prm-max-total-tokens", "prm_max_total_tokens", int, None, "Tokens in the PRM's KV pool."),
    Flag(
        "prm-tp",
        "prm_tp",
        int,
        None,
        "Ranks over which the PRM is split: as many as --tp, or 1 for a whole PRM on each; default: --tp if it divides.",
    ),
    Flag("search-max-width", "max_width", int, MAX_WIDTH, "Largest search_width that a request may ask for."),
    Flag(
        "search-max-running",
        "max_running",
        int,
        None,
        "Searches that run at once at most; default: what the pools hold.",
    ),
    Flag(
        "search-max-waiting", "max_waiting", int, MAX_WAITING, "Searches that wait at most; one more is refused (429)."
    ),
    Flag(
        "search-max-running-steps", "max_running_steps", int, None, "Steps of searches in the engine at once at most."
    ),
    Flag(
        "search-kv-pressure",
        "kv_pressure",
        float,
        0.0,
        "How much dearer KV is for ets and ets_kv at a full pool: the weight grows up to 1 + this times. With it a seed "
        "fixes no tree, because traffic decides too.",
    ),
    Flag(
        "search-forks",
        "forks",
        str,
        "shared",
        "How a step starts: decode, from the cached tokens before it; shared, likewise, and steps that are equal so far are "
        "one row of the batch; extend, with a prefill of one token. On pages of more than one token, or a cache with more "
        "than KV, it is extend.",
        ("shared", "decode", "extend"),
    ),
    Flag("search-trace", "trace", bool, False, "Show searches, running and just ended, as live pages under /search."),
    ALLOW_UNTESTED,
)


def flags_of(settings_class: type) -> tuple[Flag, ...]:
    """The flags of those settings that have one; without it, the field's default counts."""
    return tuple(
        Flag(item.flag_name, item.name, _flag_type(item), None, _flag_help(item), item.choices or None)
        for item in settings_of(settings_class)
        if item.flag_name
    )


def policy_flags() -> tuple[Flag, ...]:
    """The flags of the policies' own settings: `--search-POLICY-SETTING`."""
    return tuple(
        Flag(
            f"search-{name}-{item.name}".replace("_", "-"),
            f"{name}.{item.name}",
            _flag_type(item),
            None,
            f"{name}: {_flag_help(item)}",
            item.choices or None,
        )
        for name in registry.names()
        for item in registry.own_settings(name)
        if item.flag_name
    )


def load_policies(argv: Sequence[str] = ()) -> None:
    """Load the policies that `--search-policy` on this command line, or the environment, names. Idempotent.

    Done before the flags are parsed, because a policy brings flags and fields of requests with it. The environment tells
    child processes.

    Raises:
        SystemExit: one of them cannot be loaded.
    """
    option = f"--{POLICY.name}"
    given = [after for before, after in itertools.pairwise(argv) if before == option]
    given += [item.removeprefix(f"{option}=") for item in argv if item.startswith(f"{option}=")]
    if given:
        os.environ[POLICY.env] = given[-1]
    try:
        for spec in filter(None, (os.environ.get(POLICY.env) or "").split(",")):
            registry.load(spec.strip())
        policy_flags()  # loads what installed packages bring
    except ValueError as error:
        raise SystemExit(str(error)) from error


def _flag_type(item: Setting) -> type:
    """Several texts do not fit into a flag: a tuple is given as the one that it holds."""
    return str if item.kind is tuple else item.kind


def _flag_help(item: Setting) -> str:
    values = f" Values: {item.values_text}."
    if item.choices or item.kind is bool:  # argparse shows choices, and a switch takes no value
        values = ""
    if item.kind is tuple:
        values = r" One text, with \n for a newline and \t for a tab; a request may give several, and token ids."
    return f"{item.help_text}{values} If not set: {item.default_text}.".replace("`", "")


FLAGS = (*SERVER_FLAGS, *flags_of(SearchConfig))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group to sglang's parser. The environment gives the defaults. Does nothing the second time."""
    if any("--search" in action.option_strings for action in parser._actions):
        return
    group = parser.add_argument_group("search (sglang-ets)")
    for flag in (*FLAGS, *policy_flags()):
        is_switch = flag.type is bool
        kind: dict[str, Any] = {"action": "store_true"} if is_switch else {"type": flag.type, "choices": flag.choices}
        default = "" if flag.default is None else f" Default: {'off' if is_switch else flag.default}."
        shown = f"{flag.help}{default} Also {flag.env}.".replace("%", "%%")
        group.add_argument(f"--{flag.name}", default=flag.from_environment(), help=shown, **kind)


def from_namespace(namespace: argparse.Namespace) -> dict[str, Any]:
    """Settings from parsed flags.

    Raises:
        SystemExit: a value breaks its rule, or a search has no PRM.
    """
    every = (*FLAGS, *policy_flags())
    values = {flag.key: getattr(namespace, flag.name.replace("-", "_"), flag.default) for flag in every}
    if values["trace"] and getattr(namespace, "tokenizer_worker_num", 1) > 1:
        raise SystemExit(
            "--search-trace needs --tokenizer-worker-num 1, because one process must know every search, got "
            f"{namespace.tokenizer_worker_num}; leave one of both out"
        )
    return checked(values)


def from_environment() -> dict[str, Any]:
    """Settings from the environment alone, for `sgl.Engine`, which takes no flags.

    Raises:
        SystemExit: a value breaks its rule, or a search has no PRM.
    """
    parser = argparse.ArgumentParser(prog="sglang-ets environment")
    add_flags(parser)
    return from_namespace(parser.parse_args([]))


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the algorithm filled in and escapes read.

    Raises:
        SystemExit: a value breaks its rule, or a search has no PRM.
    """
    settings = dict(values)
    if settings["search"] not in (*registry.names(), OFF):
        known = ", ".join((*registry.names(), OFF))
        raise SystemExit(f"--search must be one of {known}, got {settings['search']!r}; choose one of these names")
    if settings["search"] == OFF:
        return settings
    settings["algorithm"] = settings["search"]
    if settings["step_delimiter"] is not None:
        settings["step_delimiter"] = settings["step_delimiter"].replace("\\n", "\n").replace("\\t", "\t")
    if settings["prm_format"] not in (AUTO, *NAMES):
        known = ", ".join((AUTO, *NAMES))
        raise SystemExit(
            f"--prm-format must be one of {known}, got {settings['prm_format']!r}; choose one of these names"
        )
    if not settings["prm_model_path"] and settings["prm_format"] not in WITHOUT_PRM:
        raise SystemExit(
            "--search needs a process reward model; give --prm-model-path, or --prm-format confidence or judge to use the "
            "policy model's own weights, or --search off"
        )
    if not 2 <= settings["max_width"] <= MAX_WIDTH:
        raise SystemExit(
            f"--search-max-width must be from 2 to {MAX_WIDTH}, got {settings['max_width']}; leave it out for {MAX_WIDTH}"
        )
    if not 0.0 <= settings["kv_pressure"] <= MAX_KV_PRESSURE:
        raise SystemExit(
            f"--search-kv-pressure must be from 0 to {MAX_KV_PRESSURE:g}, got {settings['kv_pressure']}; leave it out for 0"
        )
    for key, least in (("max_running", 1), ("max_waiting", 0), ("max_running_steps", 1)):
        if settings[key] is not None and settings[key] < least:
            name = key.replace("_", "-")
            raise SystemExit(
                f"--search-{name} must be at least {least}, got {settings[key]}; leave it out for the default"
            )
    try:
        SearchConfig.of_defaults(settings)
    except ValueError as error:
        raise SystemExit(f"a flag of the search is wrong: {error}") from error
    return settings


def is_on(settings: Mapping[str, Any] | None) -> bool:
    """Whether these settings ask for a server with search."""
    return settings is not None and settings.get("search", OFF) != OFF
