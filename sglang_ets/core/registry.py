"""Which selection policies there are, by the name that a request gives as `algorithm`.

Ours, those that installed packages announce in the entry point group `sglang_ets.policies`, and those that `--search-policy`
names as `module:Class` or `file.py:Class`. All are found in the same way: a name stands for a class, which is loaded when it
is first looked at. docs/policies.md says what a class must be.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import regex

from sglang_ets.core.settings import Setting, as_fields, check_value, settings_of, shown, wrong

GROUP = "sglang_ets.policies"
BUILT_IN = {
    "best_of_n": "sglang_ets.core.selection:BestOfN",
    "beam": "sglang_ets.core.selection:Beam",
    "dvts": "sglang_ets.core.selection:Dvts",
    "rebase": "sglang_ets.core.selection:Rebase",
    "ets_kv": "sglang_ets.core.selection:EtsKv",
    "ets": "sglang_ets.core.selection:Ets",
    "dora": "sglang_ets.core.dora:Dora",
    "particles": "sglang_ets.core.particles:Particles",
    "subpool": "sglang_ets.core.subpool:Subpool",
}
READS = ("costs", "embeddings", "pruned")  # what a policy may ask its levels to hold
PRUNED_PER_WIDTH = 4  # pruned leaves that a level holds at most if its policy reads them, in multiples of the width
_NAME = regex.compile(r"[a-z][a-z0-9_]*")
_given: dict[str, type] = {}  # by `load`


def names() -> tuple[str, ...]:
    """All names, ours first."""
    return tuple(dict.fromkeys((*BUILT_IN, *_installed(), *_given)))


def load(spec: str) -> str:
    """Add the class that `module:Class` or `file.py:Class` names; returns the policy's name. Idempotent.

    Raises:
        ValueError: there is no such class, it is no policy, or its name is taken; one sentence.
    """
    cls = _class_at(spec)
    name = getattr(cls, "name", None) or regex.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong("name of a policy", "small letters, digits and _", name, f"set `name` in the class of {spec}")
    if name in BUILT_IN or name in _installed():
        raise ValueError(f"--search-policy {spec} is named {name!r}, and so is another policy; set `name` in the class")
    _given[name] = cls
    return name


def policy_class(name: str) -> Any:
    """The class of a policy.

    Raises:
        KeyError: no policy has this name.
        ValueError: what the name stands for is no policy; one sentence.
    """
    if name in _given:
        return _given[name]
    return _class_of(name)


def own_settings(name: str) -> tuple[Setting, ...]:
    """What a policy can be told beyond the settings of every search."""
    cls = policy_class(name)
    return settings_of(cls) if is_dataclass(cls) else ()  # type: ignore[arg-type]  # a class, says `_class_at`


def make(name: str, settings: Mapping[str, Any]) -> Any:
    """A policy with these settings of its own over the defaults of its fields.

    Raises:
        ValueError: a setting that it does not have, or that breaks its rule; one sentence.
    """
    known = {item.name: item for item in own_settings(name)}
    for key in settings:
        if key not in known:
            valid = f"valid settings are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{name} has no setting {shown(key)} of its own; {valid}")
    values = as_fields(tuple(known.values()), dict(settings))
    for key, value in values.items():
        check_value(known[key], value, f"{name}.{key}")
    return policy_class(name)(**values)


def reads(name: str) -> frozenset[str]:
    """What of `READS` the levels of this policy must hold."""
    return frozenset(getattr(policy_class(name), "reads", ()))


def num_pruned_shown(policy: Any, width: int) -> int:
    """Pruned leaves that a level holds at most beside its own; 0: the policy does not read them."""
    if "pruned" not in getattr(policy, "reads", ()):
        return 0
    return width * int(getattr(policy, "pruned_per_width", PRUNED_PER_WIDTH))


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


@functools.cache
def _class_of(name: str) -> type:
    if name in BUILT_IN:
        return _class_at(BUILT_IN[name])
    return _class_at(_installed()[name].value)


def _class_at(spec: str) -> type:
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute:
        raise wrong("a policy", "given as module:Class or file.py:Class", spec, "for example my_policies:TopK")
    try:
        module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        cls = getattr(module, attribute)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ValueError(
            f"the policy {spec} cannot be loaded ({type(error).__name__}: {error}); see docs/policies.md"
        ) from error
    reads = set(getattr(cls, "reads", ()))
    unknown = reads - set(READS)
    if not isinstance(cls, type) or not callable(getattr(cls, "select", None)) or unknown:
        rule = f"a class with a method select(level, config) whose `reads` are among {', '.join(READS)}"
        raise wrong(f"the policy {spec}", rule, sorted(unknown) or cls, "see docs/policies.md")
    if {"pruned", "embeddings"} <= reads:
        rule = "without embeddings where they have pruned, whose embeddings are not kept"
        raise wrong(f"`reads` of the policy {spec}", rule, sorted(reads), "leave one of the two out")
    return cls


def _file(path: Path) -> ModuleType:
    """The file as a module of its own name, so that it loads once and its classes can be pickled."""
    name = f"sglang_ets_policy_{path.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path.resolve()):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
