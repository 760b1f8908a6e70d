"""The tables of docs/patches.md, written from the records."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sglang_ets.patches import PATCHES
from sglang_ets.patches.record import Patch

DOC = "docs/patches.md"
_MARK = re.compile(r"(<!-- patches: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text with the tables as they are now between its marks."""
    tables = {"table": table, "parameters": parameters, "contracts": contracts}
    return _MARK.sub(lambda mark: f"{mark[1]}{tables[mark[2]]()}\n{mark[3]}", text)


def short(path: str) -> str:
    """A dotted path without what all of them begin with."""
    return path.removeprefix("sglang.srt.")


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("|--- |", "|---|")


def table(patches: Iterable[Patch] = PATCHES) -> str:
    """What is patched and why, a line for each record."""
    rows = ((f"`{short(p.target)}`", p.kind, p.condition, p.why, p.upstream, p.remove_when) for p in patches)
    return markdown_table(("target", "kind", "when", "why", "upstream", "goes when"), rows)


def contracts(patches: Iterable[Patch] = PATCHES) -> str:
    """What the records rely on beside their targets, a line for each place in sglang."""
    names: dict[str, dict[str, None]] = {}  # a dict keeps the order
    hooks: dict[str, dict[str, None]] = {}
    for patch in patches:
        for use in patch.uses:
            names.setdefault(use.place, {}).update(dict.fromkeys(use.names))
            hooks.setdefault(use.place, {})[f"`{patch.hook.split(':')[1]}`"] = None
    rows = ((f"`{short(place)}`", ", ".join(names[place]), ", ".join(hooks[place])) for place in sorted(names))
    return markdown_table(("in sglang", "attributes, or arguments passed", "relied on by"), rows)


def parameters(patches: Iterable[Patch] = PATCHES) -> str:
    """What the target of each record must take, or must not have."""
    rows = []
    for patch in patches:
        is_whole = patch.kind in ("around", "replace")
        takes = f"({', '.join(patch.parameters)}{'' if is_whole else ', ...'})"
        own = takes if patch.parameters else f"no field {' or '.join(patch.adds)}"
        rows.append((f"`{short(patch.target)}`", f"`{patch.hook.split(':')[1]}`", own))
    return markdown_table(("target", "hook", "must have"), rows)
