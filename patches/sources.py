"""sglang's Python source as data: what stands at a dotted path, its parameters, its attributes, and a hash of its code.

Files are parsed and never imported, so a wheel that is not installed can be read in the same way as the one that is.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "sglang"  # nothing else is read: a wheel holds nothing else
HASH_DIGITS = 16
# What Python 3.12 adds to the tree of code that has none of it, and what only comments fill.
_NOT_CODE = {"type_params", "type_comment", "kind"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Parameters:
    """The parameters of a function in their order."""

    names: tuple[str, ...]  # `*` and `**` stand before the names that catch the rest
    required: tuple[str, ...]  # those without a default


@dataclass
class Module:
    """One parsed file."""

    name: str
    file: Path
    tree: ast.Module

    @cached_property
    def definitions(self) -> dict[str, Function | ast.ClassDef]:
        """Functions and classes at the top, also under `if` and `try`; of several with one name, the first."""
        found: dict[str, Function | ast.ClassDef] = {}
        for statement in _statements(self.tree.body):
            if isinstance(statement, Function | ast.ClassDef):
                found.setdefault(statement.name, statement)
        return found

    @cached_property
    def objects(self) -> dict[str, str]:
        """Names that stand for one object at the top, `name = Class()`, and its class."""
        found = {}
        for statement in _statements(self.tree.body):
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=cls))):
                    found[name] = cls
        return found

    @cached_property
    def imported(self) -> dict[str, str]:
        """Names that `from x import y` brings here, and where they come from."""
        return {name: origin for name, origin in self._import_lines() if name != "*"}

    @cached_property
    def star_imported(self) -> list[str]:
        """Modules all of whose names are brought here."""
        return [origin.removesuffix(".*") for name, origin in self._import_lines() if name == "*"]

    def _import_lines(self) -> Iterator[tuple[str, str]]:
        package = self.name.split(".") if self.file.stem == "__init__" else self.name.split(".")[:-1]
        for statement in _statements(self.tree.body):
            if isinstance(statement, ast.ImportFrom):
                above = package[: len(package) + 1 - statement.level] if statement.level else []
                origin = ".".join([*above, *filter(None, [statement.module])])
                yield from ((alias.asname or alias.name, f"{origin}.{alias.name}") for alias in statement.names)


@dataclass
class Place:
    """A function or class of sglang, and the module in which it is written."""

    module: Module
    node: Function | ast.ClassDef

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    @property
    def parameters(self) -> Parameters:
        """Of a function."""
        assert not isinstance(self.node, ast.ClassDef)
        given = self.node.args
        by_place = [*given.posonlyargs, *given.args]
        num_optional = len(given.defaults)
        required = by_place[: len(by_place) - num_optional]
        required += [a for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
        names = [a.arg for a in (*by_place, *given.kwonlyargs)]
        names += [f"*{given.vararg.arg}"] if given.vararg else []
        names += [f"**{given.kwarg.arg}"] if given.kwarg else []
        return Parameters(tuple(names), tuple(a.arg for a in required))

    @property
    def code_hash(self) -> str:
        """A hash of the code. Comments, line breaks and docstrings do not count."""
        return hashlib.sha256(_shape(self.node).encode()).hexdigest()[:HASH_DIGITS]


@dataclass
class Sources:
    """The modules below a folder that holds `sglang/`, parsed at first use."""

    root: Path
    _modules: dict[str, Module | None] = field(default_factory=dict, repr=False)
    _attributes: dict[ast.AST, frozenset[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def installed(cls) -> Sources:
        """Those of the sglang that this process would import."""
        spec = find_spec(PACKAGE)
        assert spec is not None and spec.origin is not None, "sglang is not installed"
        return cls(Path(spec.origin).parents[1])

    @property
    def files(self) -> list[Path]:
        """Those that have been read."""
        return [module.file for module in self._modules.values() if module is not None and module.name != PACKAGE]

    def find(self, path: str) -> Place | None:
        """What is written at a dotted path: of a class also what it inherits, of a module also what it imports."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            module = self._module(".".join(parts[:end]))
            if module is not None:
                return self._descend(module, parts[end:])
        return None

    def attributes(self, place: Place) -> set[str]:
        """Names that an object of this class has: methods, fields, and what its methods assign to `self`."""
        names: set[str] = set()
        for one in self._with_bases(place):
            if one.node not in self._attributes:
                self._attributes[one.node] = frozenset(_own_attributes(one.node))
            names |= self._attributes[one.node]
        return names

    def _module(self, name: str) -> Module | None:
        if name not in self._modules:
            stem = self.root.joinpath(*name.split("."))
            files = (stem.with_suffix(".py"), stem / "__init__.py")
            file = next((file for file in files if file.is_file()), None) if name.split(".")[0] == PACKAGE else None
            self._modules[name] = Module(name, file, ast.parse(file.read_bytes())) if file else None
        return self._modules[name]

    def _descend(self, module: Module, names: list[str]) -> Place | None:
        if not names:
            return None
        first, *rest = names
        first = module.objects.get(first, first)
        node = module.definitions.get(first)
        if node is None:
            return self._imported(module, first, rest)
        place: Place | None = Place(module, node)
        for name in rest:
            place = self._member(place, name) if place is not None and place.is_class else None
        return place

    def _imported(self, module: Module, name: str, rest: list[str]) -> Place | None:
        origins = [origin] if (origin := module.imported.get(name)) else [f"{m}.{name}" for m in module.star_imported]
        found = (self.find(".".join([origin, *rest])) for origin in origins)
        return next((place for place in found if place is not None), None)

    def _member(self, place: Place, name: str) -> Place | None:
        for one in self._with_bases(place):
            for statement in _statements(one.node.body):
                if isinstance(statement, Function | ast.ClassDef) and statement.name == name:
                    return Place(one.module, statement)
        return None

    def _with_bases(self, place: Place) -> Iterator[Place]:
        """The class and, depth first, the classes of sglang that it inherits from."""
        yield place
        assert isinstance(place.node, ast.ClassDef)
        for base in place.node.bases:
            found = self._descend(place.module, ast.unparse(base).split("[")[0].split("."))
            if found is not None and found.is_class:
                yield from self._with_bases(found)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, those under `if`, `try` and `with` among them."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            handlers = [line for handler in getattr(statement, "handlers", ()) for line in handler.body]
            yield from _statements([*statement.body, *handlers, *getattr(statement, "orelse", ())])


def _own_attributes(node: ast.AST) -> Iterator[str]:
    assert isinstance(node, ast.ClassDef)
    for statement in _statements(node.body):
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield statement.name
                yield from _assigned_to_self(statement)
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Assign():
                yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def _assigned_to_self(function: Function) -> Iterator[str]:
    for node in ast.walk(function):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def _shape(node: object) -> str:
    """The tree as text: the same for the same code, whatever its layout and the version of Python that parsed it."""
    match node:
        case ast.AST():
            parts = []
            for name, value in ast.iter_fields(node):
                if name == "body" and _begins_with_text(value):
                    value = value[1:]
                if isinstance(node, ast.JoinedStr):  # some versions of Python end a format with an empty text
                    value = [part for part in value if getattr(part, "value", None) != ""]
                if name not in _NOT_CODE and value not in (None, []):
                    parts.append(f"{name}={_shape(value)}")
            return f"{type(node).__name__}({','.join(parts)})"
        case list():
            return f"[{','.join(map(_shape, node))}]"
        case _:
            return repr(node)


def _begins_with_text(body: object) -> bool:
    """Whether a block begins with a docstring, or with any other text that stands where a statement could."""
    match body:
        case [ast.Expr(value=ast.Constant(value=str())), *_]:
            return True
    return False
