"""Frozen dataclasses to and from JSON and TOML, strictly.

One converter for every value of the package (crowds, profiles, plans, messages), so that each
round-trips and each bad input is told by its path: `crowd.devices[2].memory_bytes: expected int,
got 'lots'`. Unknown fields are refused. It knows types, not meanings: values check themselves in
`__post_init__`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import FormatError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Turns a value into dicts, lists, strings, numbers, booleans and None.

    Fields that hold None are left out, since TOML has no null. Infinity and NaN are kept as the
    strings "inf", "-inf" and "nan": JSON has no spelling for them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for field in dataclasses.fields(value):
            if not field.init:
                continue  # derived
            item = getattr(value, field.name)
            if item is not None:
                plain[field.name] = to_plain(item)
        return plain
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _expected(where: str, what: str, got: Any) -> FormatError:
    shown = repr(got)
    return FormatError(f"{where}: expected {what}, got {shown[:120]}")


def _build(kind: Any, plain: Any, where: str) -> Any:
    if isinstance(kind, typing.NewType):
        return _build(kind.__supertype__, plain, where)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if plain not in choices:
            raise _expected(where, " or ".join(map(repr, choices)), plain)
        return plain
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if plain is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        if len(options) == 1:
            return _build(options[0], plain, where)
        for option in options:
            try:
                return _build(option, plain, where)
            except FormatError:
                continue
        raise _expected(where, str(kind), plain)
    if origin is tuple:
        if not isinstance(plain, (list, tuple)):
            raise _expected(where, "a list", plain)
        args = typing.get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_build(args[0], x, f"{where}[{i}]") for i, x in enumerate(plain))
        if len(plain) != len(args):
            raise _expected(where, f"a list of {len(args)}", plain)
        return tuple(
            _build(arg, x, f"{where}[{i}]")
            for i, (arg, x) in enumerate(zip(args, plain, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(plain, Mapping):
            raise _expected(where, "a table", plain)
        _, item_kind = typing.get_args(kind)
        return {str(k): _build(item_kind, v, f"{where}.{k}") for k, v in plain.items()}
    if kind is Any:
        return plain
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(plain)
        except ValueError:
            raise _expected(where, " or ".join(repr(m.value) for m in kind), plain) from None
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), plain, where)
    if kind is float:
        if isinstance(plain, str) and plain in ("inf", "-inf", "nan"):
            return float(plain)
        if isinstance(plain, bool) or not isinstance(plain, (int, float)):
            raise _expected(where, "a number", plain)
        return float(plain)
    if kind is int:
        if isinstance(plain, float) and plain.is_integer():
            return int(plain)
        if isinstance(plain, bool) or not isinstance(plain, int):
            raise _expected(where, "an integer", plain)
        return plain
    if kind in (str, bool):
        if not isinstance(plain, kind):
            raise _expected(where, "a string" if kind is str else "true or false", plain)
        return plain
    raise TypeError(f"{where}: values of type {kind} have no plain form")


def _build_dataclass(cls: type, plain: Any, where: str) -> Any:
    if not isinstance(plain, Mapping):
        raise _expected(where, f"a table of {cls.__name__}", plain)
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    unknown = [name for name in plain if name not in fields]
    if unknown:
        raise FormatError(
            f"{where}: unknown field {unknown[0]!r} for {cls.__name__};"
            f" known fields: {', '.join(sorted(fields))}"
        )
    arguments = {}
    for name, field in fields.items():
        if name in plain:
            arguments[name] = _build(hints[name], plain[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if _accepts_none(hints[name]):
                arguments[name] = None
            else:
                raise FormatError(f"{where}: missing field {name!r} of {cls.__name__}")
    return cls(**arguments)


def _accepts_none(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def from_plain(cls: type[T], plain: Any, where: str | None = None) -> T:
    """Builds a value of `cls` from what `to_plain` made.

    Args:
        where: How the source is called in errors, a file name say.

    Raises:
        FormatError: A field is unknown, missing or of another type; names its path.
    """
    return _build_dataclass(cls, plain, where or cls.__name__)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text of a value; keys keep field order, so equal values give equal text."""
    separators = (",", ":") if indent is None else None
    return json.dumps(to_plain(value), indent=indent, separators=separators, allow_nan=False)


def from_json(cls: type[T], text: str | bytes, where: str | None = None) -> T:
    """Reads what `to_json` wrote.

    Raises:
        FormatError: Not JSON, or not a `cls`.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{where or cls.__name__}: not JSON: {exc}") from exc
    return from_plain(cls, plain, where)


def to_toml(value: Any) -> str:
    """TOML text of a value."""
    import tomli_w

    return tomli_w.dumps(to_plain(value))


def from_toml(cls: type[T], text: str, where: str | None = None) -> T:
    """Reads what `to_toml` wrote, or a person.

    Raises:
        FormatError: Not TOML, or not a `cls`.
    """
    import tomllib

    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise FormatError(f"{where or cls.__name__}: not TOML: {exc}") from exc
    return from_plain(cls, plain, where)


def load(cls: type[T], path: str | Path) -> T:
    """Reads a value from a `.json` or `.toml` file.

    Raises:
        FormatError: The file is missing, unreadable, of another ending, or not a `cls`.
    """
    path = Path(path)
    if path.suffix not in (".json", ".toml"):
        raise FormatError(f"{path}: expected a .json or .toml file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise FormatError(f"{path}: cannot be read: {exc}") from exc
    reader = from_json if path.suffix == ".json" else from_toml
    return reader(cls, text, str(path))
