"""What a setting is: a field of a frozen dataclass that carries its help, its range and the places where it can be set.

A class of settings is the one list from which everything else is made: the rules that `check_fields` holds, the flags
(`sglang_ets.flags`), the schema of a request (`sglang_ets.api.protocol`) and the table of docs/api.md (`markdown_table`).
"""

from __future__ import annotations

import functools
import reprlib
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_COUNT = 2**31 - 1  # of every integer without a limit of its own
KEY = "setting"  # in the metadata of a field
MAX_SHOWN_CHARS = 80
MAX_SHOWN_BITS = 128


@dataclass(frozen=True)
class About:
    """What a field says of itself beside its name, type and default."""

    help: str
    low: float | None = None  # least value of a number
    high: float | None = None  # greatest value
    unit: str = ""
    request_name: str = ""  # what a request calls it, where that differs from the field's name
    is_outer: bool = False  # it stands beside `search` in a request, not inside
    has_flag: bool = False  # `--search-NAME` sets the server's default
    default_text: str = ""  # what the default is, where its value does not say it
    values_text: str = ""  # which values there are, where the type does not say it
    json_type: Any = None  # the type in a request's schema, where that differs from the field's
    check: Callable[[Any], None] | None = None  # a rule beyond type and range; raises ValueError
    choices: Callable[[], tuple[str, ...]] | None = None  # of a closed choice that is not known before the program runs


def setting(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field with this default that carries `About(help, **about)`."""
    return field(default=default, metadata={KEY: About(help, **about)})


@dataclass(frozen=True)
class Setting:
    """One field of a class of settings, as every reader of the list needs it."""

    name: str
    default: Any
    kind: type  # bool, int, float, str or tuple
    literals: tuple[str, ...]  # choices that the type names
    is_nullable: bool  # None is a value: "not limited", or "as another setting says"
    plain_type: Any
    about: About

    @property
    def choices(self) -> tuple[str, ...]:
        """Of a closed choice; empty: any text."""
        return self.literals if self.about.choices is None else self.about.choices()

    @property
    def json_type(self) -> Any:
        """Its type in the schema of a request."""
        if self.about.json_type is None and self.about.choices is not None:
            return Literal[self.choices]
        return self.about.json_type or self.plain_type

    @property
    def request_name(self) -> str:
        return self.about.request_name or self.name

    @property
    def flag_name(self) -> str:
        """Of the flag that sets the server's default, without the dashes in front."""
        return f"search-{self.name.replace('_', '-')}" if self.about.has_flag else ""

    @property
    def low(self) -> float:
        """Least value of a number."""
        unlimited = -MAX_COUNT if self.kind is int else -sys.float_info.max
        return unlimited if self.about.low is None else self.about.low

    @property
    def high(self) -> float:
        """Greatest value of a number."""
        unlimited = MAX_COUNT if self.kind is int else sys.float_info.max
        return unlimited if self.about.high is None else self.about.high

    @property
    def values_text(self) -> str:
        """Which values there are, for a person."""
        if self.about.values_text:
            return self.about.values_text
        if self.choices:
            return ", ".join(f"`{choice}`" for choice in self.choices)
        if self.kind is bool:
            return "`true`, `false`"
        if self.kind is int:
            return f"{self.low} or more" if self.about.high is None else f"{self.low} to {self.high}"
        return f"{self.low:g} to {self.high:g}" if self.kind is float else "text"

    @property
    def default_text(self) -> str:
        """What a search has that sets nothing, for a person."""
        if self.about.default_text:
            return self.about.default_text
        if self.default is None:
            return "none"
        return f"`{str(self.default).lower()}`" if self.kind is bool else f"`{self.default}`"

    @property
    def help_text(self) -> str:
        """One sentence."""
        unit = f", in {self.about.unit}" if self.about.unit else ""
        return f"{self.about.help[0].upper()}{self.about.help[1:]}{unit}."


def settings_of(cls: type) -> tuple[Setting, ...]:
    """All settings of a class, in the order of its fields; a field without `setting` is none."""
    return _read(cls)


@functools.cache
def _read(cls: Any) -> tuple[Setting, ...]:
    hints = get_type_hints(cls)
    return tuple(
        _setting(item.name, item.default, hints[item.name], item.metadata[KEY])
        for item in fields(cls)
        if KEY in item.metadata
    )


def _setting(name: str, default: Any, hint: Any, about: About) -> Setting:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    (plain,) = [part for part in parts if part is not type(None)]
    choices = get_args(plain) if get_origin(plain) is Literal else ()
    kind = str if choices else (get_origin(plain) or plain)
    return Setting(
        name,
        None if default is MISSING else default,
        kind,
        choices,
        len(parts) > 1,
        plain,
        about,
    )


def check_fields(config: Any) -> None:
    """Hold every field to its own rule. Rules between fields are the class's.

    Raises:
        ValueError: one sentence with the field, its rule, the value and a remedy.
    """
    for item in settings_of(type(config)):
        check_value(item, getattr(config, item.name))


def check_value(item: Setting, value: object, name: str = "") -> None:
    """`name` is what the client calls the setting, if it is not its own name.

    Raises:
        ValueError: the value breaks the setting's rule.
    """
    name = name or item.request_name
    if value is None and item.is_nullable:
        return
    if item.choices and (not isinstance(value, str) or value not in item.choices):
        raise wrong(name, f"one of {', '.join(item.choices)}", value, "choose one of these names")
    if item.kind is bool and not isinstance(value, bool):
        raise wrong(name, "true or false", value, "send a JSON boolean")
    if item.kind in (int, float):
        _check_number(item, value, name)
    if item.kind is str and not isinstance(value, str):
        raise wrong(name, "text", value, "send a JSON string")
    if item.about.check is not None:
        item.about.check(value)


def _check_number(item: Setting, value: object, name: str) -> None:
    kinds, noun = ((int,), "an integer") if item.kind is int else ((int, float), "a number")
    # A comparison, unlike a conversion, takes integers of any length; NaN fails it.
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not item.low <= value <= item.high:  # type: ignore[operator]
        low, high = (item.low, item.high) if item.kind is int else (f"{item.low:g}", f"{item.high:g}")
        raise wrong(name, f"{noun} from {low} to {high}", value, "choose a value in that range")


def wrong(name: str, rule: str, value: object, remedy: str) -> ValueError:
    """The error of a value that breaks its rule."""
    return ValueError(f"{name} must be {rule}, got {shown(value)}; {remedy}")


class _ShortRepr(reprlib.Repr):
    """Of values that a client chose: bounded in length and depth, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, MAX_SHOWN_CHARS, MAX_SHOWN_CHARS
        self.maxlist = self.maxtuple = self.maxdict = 4

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out thousands of digits."""
        return repr(x) if x.bit_length() <= MAX_SHOWN_BITS else f"an integer of {x.bit_length()} bits"


_SHORT = _ShortRepr()


def shown(value: object) -> str:
    """The value for an error: short, on one line, without half characters."""
    return _SHORT.repr(value)


def is_unicode(text: str) -> bool:
    """Whether all characters are whole. JSON may bring half of a surrogate pair, which no tokenizer and no answer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_fields(settings: tuple[Setting, ...], values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists, and one item may stand for a list of one, where a field is a tuple."""
    for item in settings:
        if item.kind is tuple and item.name in values:
            value = values[item.name]
            values[item.name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values


def markdown_table(cls: type) -> str:
    """All settings of a class as a table of Markdown."""
    lines = ["| setting | default | values | flag | meaning |", "|---|---|---|---|---|"]
    for item in settings_of(cls):
        name = f"`{item.request_name}`" + (" (beside `search`)" if item.about.is_outer else "")
        flag = f"`--{item.flag_name}`" if item.flag_name else ""
        lines.append(f"| {name} | {item.default_text} | {item.values_text} | {flag} | {item.help_text} |")
    return "\n".join(lines)
