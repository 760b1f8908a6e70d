"""What one patch is: plain data that can be checked, applied and printed."""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["before", "after", "around", "replace"]
# loaded: with the plugin, search on or off. always: whenever search is on. cpu: search is on and sglang runs on a CPU.
Condition = Literal["loaded", "always", "cpu"]


class PatchDrift(SystemExit):
    """A target is not what the patch was written for. Ends the process: sglang's plugin loader swallows `Exception`."""


@dataclass(frozen=True)
class Patch:
    """One hook on one function, method or class of sglang at the pinned version."""

    target: str  # dotted path
    kind: Kind
    hook: str  # "module:name"; a class if the target is a class
    sha256: str  # of the target's source text
    why: str
    upstream: str  # link, or "none: reason"
    remove_when: str
    condition: Condition = "always"

    def resolve_target(self) -> Any:
        """The object that stands at `target` now.

        Raises:
            PatchDrift: there is no such object.
        """
        try:
            return pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError) as error:
            raise PatchDrift(drift_message(self, f"nothing ({error})")) from error

    def resolve_hook(self) -> Any:
        return pkgutil.resolve_name(self.hook)

    def current_sha256(self) -> str:
        """Hash of the target's source as installed; a wrapper leads to the function that it wraps."""
        source = inspect.getsource(inspect.unwrap(self.resolve_target()))
        return hashlib.sha256(source.encode()).hexdigest()


def drift_message(patch: Patch, found: str) -> str:
    return (
        f"sglang-ets: {patch.target} is not the code that its patch was written for.\n"
        f"  expected: sha256 {patch.sha256}\n"
        f"  found:    {found}\n"
        f"  What to do: install the sglang version named in setup.py. To move to another version, read the new code, "
        f"adapt {patch.hook}, and put the hash that `python -m sglang_ets.patches --hashes` prints into its record."
    )
