"""Conventions of the repository that a reviewer would otherwise have to watch."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from sglang_ets.patches import table

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("sglang_ets", "kernels", "patches", "tests", "bench")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PURE_CORE = ("config", "tree", "allocation", "clusters", "ilp", "selection", "search", "answer", "patterns")
MAX_FILE_LINES = 400


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, and our own modules by their full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_source_file_is_of_a_readable_size(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("name", PURE_CORE)
def test_pure_core_knows_no_engine(name: str) -> None:
    packages = {module.split(".")[0] for module in imports(ROOT / "sglang_ets" / f"{name}.py")}
    assert packages.isdisjoint({"sglang", "torch", "triton", "fastapi"})


def test_highspy_has_one_user() -> None:
    users = {path.name for path in SOURCES if path.parts[len(ROOT.parts)] != "tests" and "highspy" in imports(path)}
    assert users == {"ilp.py"}


def test_the_pin_stands_once() -> None:
    pin = re.search(r'SGLANG_VERSION = "([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert pin is not None
    settings = [ROOT / name for name in ("pyproject.toml", "Makefile", ".ci/run", "setup.py")]
    holders = [path for path in (*SOURCES, *settings) if pin[1] in path.read_text(encoding="utf-8")]
    assert holders == [ROOT / "setup.py"]


def test_readme_shows_the_patch_table() -> None:
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8"), (
        "paste the output of `python -m sglang_ets.patches` into README.md"
    )


def test_every_folder_of_the_file_map_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        assert f"{folder}/" in readme
        assert (ROOT / folder).is_dir()


def test_console_script_and_plugin_point_at_functions() -> None:
    import pkgutil

    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    targets = re.findall(r'"[\w-]+ = (sglang_ets[\w.]*:\w+)"', text)
    assert len(targets) == 2
    assert all(callable(pkgutil.resolve_name(target)) for target in targets)


def test_make_names_its_targets() -> None:
    for target in ("install", "demo", "test", "serve", "lint", "python", "clean"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
