"""Reading code without importing it: what stands where, what it takes, what it has, and when its hash changes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sglang_ets.patches.sources import Place, Sources

BASE = """
from .sub import moved as renamed
from sglang.more import *

class Base:
    limit: int = 3

    def __init__(self, size):
        self.size, self.left = size, size
        if size:
            self.late: int = 1

    def shared(self, a, b=1, *rest, key, option=None, **more):
        other.not_ours = 1
"""
CHILD = """
import sglang.base
from sglang.base import Base

try:
    import fast
except ImportError:
    def fallback(x): ...

if fast:
    class Child(Base):
        class Inner:
            color = "red"

        async def own(self): ...
else:
    class Child: ...

class Other(sglang.base.Base): ...
"""


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    files = {
        "sglang/__init__.py": "",
        "sglang/base/__init__.py": BASE,
        "sglang/base/sub.py": "def moved(x): ...",
        "sglang/more.py": "def starred(y): ...\nmade = Made()\nclass Made: ...",
        "sglang/child.py": CHILD,
        "elsewhere.py": "def foreign(): ...",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Sources(tmp_path)


def place(sources: Sources, path: str) -> Place:
    found = sources.find(path)
    assert found is not None, path
    return found


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("sglang.base.Base", "sglang.base"),
        ("sglang.base.Base.shared", "sglang.base"),
        ("sglang.child.Child.shared", "sglang.base"),
        ("sglang.child.Child.own", "sglang.child"),
        ("sglang.child.Child.Inner", "sglang.child"),
        ("sglang.child.fallback", "sglang.child"),
        ("sglang.child.Base.shared", "sglang.base"),
        ("sglang.base.renamed", "sglang.base.sub"),
        ("sglang.base.starred", "sglang.more"),
        ("sglang.more.made", "sglang.more"),
    ],
)
def test_finds_what_is_written_inherited_and_imported(sources: Sources, path: str, module: str) -> None:
    assert place(sources, path).module.name == module


@pytest.mark.parametrize(
    "path", ["sglang.child.gone", "sglang.gone.Child", "sglang.child.Child.gone", "sglang.child", "elsewhere.foreign"]
)
def test_finds_nothing_else(sources: Sources, path: str) -> None:
    assert sources.find(path) is None


def test_parameters_in_their_order_and_those_without_a_default(sources: Sources) -> None:
    taken = place(sources, "sglang.base.Base.shared").parameters
    assert taken.names == ("self", "a", "b", "key", "option", "*rest", "**more")
    assert taken.required == ("self", "a", "key")


def test_attributes_are_methods_fields_and_what_is_assigned_to_self(sources: Sources) -> None:
    inherited = {"limit", "size", "left", "late", "__init__", "shared"}
    assert sources.attributes(place(sources, "sglang.base.Base")) == inherited
    assert sources.attributes(place(sources, "sglang.child.Child")) == inherited | {"own"}


def hash_of(code: str) -> str:
    tree = ast.parse(code)
    return Place(None, tree.body[0]).code_hash  # type: ignore[arg-type]


ALL_KINDS = """
@decorated(1)
class C(Base, key=2):
    '''text'''
    limit: int | None = None

    async def f(self, a, /, b=(1, 2.5), *rest, c: str = 'x', **more) -> dict[str, int]:
        if (n := len(rest)) > 1 and not a[1:, ::2]:
            print(f"{a!r:>{n}} {b=} " "more", *rest, sep=b"")
        with open(a) as one, open(b):
            yield {**more, 'k': [x for x in rest if x is not ...]}
        try:
            n += await g(lambda: 0)
        except (KeyError, ValueError) as error:
            raise TypeError from error
        match n:
            case {"a": [1, *_]} | C(limit=None):
                return
"""


def test_the_hash_is_the_same_in_every_python() -> None:
    """A record made with one version is read with another."""
    assert hash_of(ALL_KINDS) == "f373c8f1266fbe8d"


CODE = "def f(a, b=1):\n    if a:\n        return b\n    return g(a, None)\n"


@pytest.mark.parametrize(
    "same",
    [
        'def f(a, b=1):\n    """What it does."""\n    # why\n    if a:  # a comment\n        return b\n    return g(a, None)\n',
        "def f(\n    a,\n    b = 1,\n):\n    if a: return (b)\n\n    return g(\n        a, None\n    )\n",
    ],
)
def test_comments_layout_and_docstrings_do_not_change_the_hash(same: str) -> None:
    assert hash_of(same) == hash_of(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [("b=1", "b=2"), ("b=1", "b=True"), ("None", "0"), ("if a", "if not a"), ("def f", "async def f"), ("g(a", "g(b")],
)
def test_any_other_change_of_the_code_does(old: str, new: str) -> None:
    assert hash_of(CODE.replace(old, new)) != hash_of(CODE)
