"""What one patch is: plain data that can be checked, applied and printed."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sglang_ets.patches.sources import Place, Sources

Kind = Literal["before", "after", "around", "replace"]
# loaded: with the plugin, search on or off. always: whenever search is on. cpu: search is on and sglang runs on a CPU.
Condition = Literal["loaded", "always", "cpu"]
Change = Literal["none", "text", "contract"]


@dataclass(frozen=True)
class Use:
    """Something of sglang that a hook, or the code behind it, relies on beside the target."""

    place: str  # dotted path
    names: tuple[
        str, ...
    ] = ()  # of a class: attributes read or called; of a function: the arguments passed, all by name

    def breaks(self, sources: Sources) -> Iterator[str]:
        """What of it these sources do not offer, in words."""
        found = sources.find(self.place)
        if found is None:
            yield f"{self.place} is gone"
            return
        if found.is_class:
            missing = sorted(set(self.names) - sources.attributes(found))
            if missing:
                yield f"{self.place} has no {', '.join(missing)}"
            return
        offered = found.parameters
        missing = [name for name in self.names if name not in offered.names]
        new = [name for name in offered.required if name not in (*self.names, "self", "cls")]
        if missing:
            yield f"{self.place} takes no {', '.join(missing)}"
        if new:
            yield f"{self.place} requires {', '.join(new)} as well"


@dataclass(frozen=True)
class Patch:
    """One hook on one function, method or class of sglang, and what must be so that the hook does what it should."""

    target: str  # dotted path
    kind: Kind
    hook: str  # "module:name"; a class if the target is a class
    parameters: tuple[
        str, ...
    ]  # of the target: all of them (around, replace) or the first (before, after); a class: none
    tested: tuple[str, ...]  # hashes of the target's code, one for each version that passed the tests
    why: str
    upstream: str  # link, or "none: reason"
    remove_when: str
    condition: Condition = "always"
    uses: tuple[Use, ...] = ()
    adds: tuple[str, ...] = ()  # fields that a class in the target's place adds, so that sglang must not have them

    def resolve_target(self) -> Any:
        """The object that stands at `target` now; imports sglang.

        Raises:
            ImportError, AttributeError: there is none.
        """
        return pkgutil.resolve_name(self.target)

    def live_break(self) -> str | None:
        """What is wrong with the object at `target` in this process, in words; hooks of the registry are looked through."""
        try:
            origin = inspect.unwrap(self.resolve_target()).__module__
        except (ImportError, AttributeError) as error:
            return f"{self.target} cannot be imported ({error})"
        return None if origin.split(".")[0] == "sglang" else f"{self.target} has been replaced by code of {origin}"

    def resolve_hook(self) -> Any:
        return pkgutil.resolve_name(self.hook)

    def compare(self, sources: Sources) -> Comparison:
        """Hold the record against the sources of some version."""
        place = sources.find(self.target)
        if place is None:
            return Comparison(self, None, (f"{self.target} is gone",))
        breaks = [*self._own_breaks(place, sources), *(line for use in self.uses for line in use.breaks(sources))]
        return Comparison(self, place.code_hash, tuple(breaks))

    def _own_breaks(self, place: Place, sources: Sources) -> Iterator[str]:
        if place.is_class:
            taken = sorted(set(self.adds) & sources.attributes(place))
            if taken:
                yield f"{self.target} has {', '.join(taken)} of its own"
            return
        names = place.parameters.names
        is_whole = self.kind in ("around", "replace")
        if (names if is_whole else names[: len(self.parameters)]) != self.parameters:
            rule = "" if is_whole else "first of all "
            yield f"{self.target} takes ({', '.join(names)}), expected {rule}({', '.join(self.parameters)})"


@dataclass(frozen=True)
class Comparison:
    """A record beside the code of one version of sglang."""

    patch: Patch
    code_hash: str | None  # None: there is no target
    breaks: tuple[str, ...]  # of the contract, in words

    @property
    def change(self) -> Change:
        """none: the tested code; text: other code that keeps the contract; contract: it does not."""
        if self.breaks:
            return "contract"
        return "none" if self.code_hash in self.patch.tested else "text"
