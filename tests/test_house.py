"""Conventions of the repository that a reviewer would otherwise have to watch."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest
from sglang_ets.patches import docs

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("sglang_ets", "kernels", "patches", "tests", "bench")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MAX_FUNCTION_LINES = 50
# What each room may import of ours. An import points one way only, also under TYPE_CHECKING.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "wire": set(),
    "math_process": set(),
    "kernels": set(),
    "kv": {"core"},
    "prm": {"core", "kv", "kernels"},
    "engine": {"core", "kv", "prm", "kernels", "wire", "math_process"},
    "api": {"core", "wire"},
    "testing": {"core"},
    "tools": {"core", "prm", "api", "wire", "math_process", "testing"},
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, by their full name, and what it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_functions_are_of_a_readable_size() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or node.lineno) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, f"functions of more than {MAX_FUNCTION_LINES} lines: {long}"


def room_of(module: str) -> str:
    """`sglang_ets.core.tree` -> `core`; other packages are their own rooms."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sglang_ets" and len(parts) > 1 else parts[0]


def files_of(room: str) -> list[Path]:
    place = ROOT / room if room == "kernels" else ROOT / "sglang_ets" / room
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    ours = {*ROOMS, "patches"}
    for path in files_of(room):
        rooms = {room_of(module) for module in imports(path)} & ours
        assert rooms <= ROOMS[room] | {room}, f"{path.relative_to(ROOT)} imports {rooms - ROOMS[room] - {room}}"


def test_no_two_modules_import_each_other() -> None:
    graph = {
        f"sglang_ets.{path.relative_to(ROOT / 'sglang_ets').with_suffix('').as_posix().replace('/', '.')}": imports(
            path
        )
        for path in (ROOT / "sglang_ets").rglob("*.py")
    }
    list(graphlib.TopologicalSorter({name: modules & set(graph) for name, modules in graph.items()}).static_order())


def test_pure_rooms_know_no_engine() -> None:
    for path in (*files_of("core"), *files_of("wire")):
        packages = {module.split(".")[0] for module in imports(path)}
        assert packages.isdisjoint({"sglang", "torch", "triton", "fastapi"}), path


def test_highspy_has_one_user() -> None:
    users = {path.name for path in SOURCES if path.parts[len(ROOT.parts)] != "tests" and "highspy" in imports(path)}
    assert users == {"ilp.py"}


def test_the_pin_stands_once() -> None:
    pin = re.search(r'SGLANG_VERSION = "([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert pin is not None
    settings = [
        ROOT / name for name in ("pyproject.toml", "Makefile", ".ci/run", ".ci/weekly", ".ci/install.py", "setup.py")
    ]
    holders = [path for path in (*SOURCES, *settings) if pin[1] in path.read_text(encoding="utf-8")]
    assert holders == [ROOT / "setup.py"]


def test_docs_show_the_patches_as_they_are() -> None:
    text = (ROOT / docs.DOC).read_text(encoding="utf-8")
    assert text.count("<!-- patches: ") == 3
    assert docs.filled(text) == text, "run `python -m sglang_ets.patches`"


def test_console_script_and_plugin_point_at_functions() -> None:
    import pkgutil

    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    targets = re.findall(r'"[\w-]+ = (sglang_ets[\w.]*:\w+)"', text)
    assert len(targets) == 2
    assert all(callable(pkgutil.resolve_name(target)) for target in targets)
