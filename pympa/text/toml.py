"""TOML into frozen structs; anything wrong with a file is reported in one line.

`tomllib` recurses for each bracket, and needs quadratic time for the parts of a dotted key, so
both are limited before it parses a text.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from pympa.spec import SpecError
from pympa.text.model_toml import plain_model

T = TypeVar("T")
_MOST_LEVELS = 32  # of nested brackets, and of names in a dotted key: our files have 6
_MOST_BITS = 63  # of a whole number, as in TOML
_LONGEST_NAME = 64  # of a field for which another one is suggested
_LIKE, _FARTHER = 0.6, 0.1  # least similarity (of 1) to a field; the loss for each inner table
_TOKEN = re.compile(
    r"""\#[^\n]*                               # a comment
    | \"\"\"(?:[^\\]|\\.?)*?(?:\"\"\"|\Z)      # strings, which may lack their end
    | '''.*?(?:'''|\Z)
    | "(?:[^"\\\n]|\\.?)*"?
    | '[^'\n]*'?
    | [][{}.,=\n]""",
    re.DOTALL | re.VERBOSE,
)


def load_toml(text: bytes, where: str) -> dict[str, Any]:
    """Decode TOML.

    Args:
        text: the document, UTF-8.
        where: the file name for messages.

    Raises:
        SpecError: the text is not TOML, is nested too deeply, or has whole numbers beyond 64 bits.
    """
    if not text.strip():
        raise SpecError(f"{where}: the file is empty")
    try:
        decoded = text.decode().replace("\r\n", "\n")
        _refuse_depth(decoded, where)
        values = tomllib.loads(decoded)
    except SpecError:
        raise
    except ValueError as error:
        why = str(error)
        if "set_int_max_str_digits" in why:  # Python's hint does not help a user
            why = f"expected whole numbers of at most {_MOST_BITS} bits; got a longer one"
        raise SpecError(f"{where}: {why}") from None
    _refuse_long_numbers(values, where)
    return values


def parse_toml(text: bytes, kind: type[T], where: str) -> T:
    """Decode TOML into the frozen struct `kind`.

    Args:
        text: the document, UTF-8.
        kind: the struct type to build.
        where: the file name for messages.

    Raises:
        SpecError: see `load_toml`, or a field is missing, unknown or of a wrong type.
    """
    return convert_toml(load_toml(text, where), kind, where)


def convert_toml(values: dict[str, Any], kind: type[T], where: str) -> T:
    """Convert decoded TOML into the frozen struct `kind`; see `parse_toml`."""
    try:
        return msgspec.convert(plain_model(values), kind)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    except msgspec.ValidationError as error:
        raise SpecError(f"{where}: {error}{_hint(str(error), kind)}") from None


def _refuse_depth(text: str, where: str) -> None:
    """Refuse deeply nested brackets and long dotted keys."""
    depth = parts = 0
    for token in _TOKEN.finditer(text):
        first = token[0][0]
        if first in "[{":
            depth += 1
        elif first in "]}":
            depth -= 1
        if first == ".":
            parts += 1
        elif first not in "#'\"":
            parts = 0
        if max(depth, parts) > _MOST_LEVELS:
            line = text.count("\n", 0, token.start()) + 1
            what = "levels of brackets" if depth > _MOST_LEVELS else "names in a dotted key"
            raise SpecError(f"{where}: line {line}: expected at most {_MOST_LEVELS} {what}")


def _refuse_long_numbers(value: Any, where: str) -> None:
    """Refuse whole numbers beyond TOML's range, which floats cannot hold either."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise SpecError(
            f"{where}: expected whole numbers of at most {_MOST_BITS} bits; got one of "
            f"{value.bit_length():,}"
        )
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        _refuse_long_numbers(part, where)


def _hint(message: str, kind: type[Any]) -> str:
    """Return a suggestion for an unknown field, in the spelling of the file."""
    unknown = re.search(r"unknown field `(.+?)`(?: - at `\$(.*)`)?", message)
    if unknown is None or len(unknown[1]) > _LONGEST_NAME:
        return ""
    name, steps = unknown[1], re.findall(r"\w+|\[.*?\]", unknown[2] or "")
    for above in range(len(steps)):
        if steps[above][0] != "[" and name in _fields(_at(kind, steps[:above])):
            table = "".join(step if step[0] == "[" else f".{step}" for step in steps[:above])
            return f"; this field belongs to `${table}`"
    best, meant = _LIKE, ""
    for path in _paths(_at(kind, steps)):
        plain = path.replace("[...]", "")
        for spelling in {plain.replace(".", "_"), plain.rpartition(".")[2]}:
            like = difflib.SequenceMatcher(None, name, spelling).ratio()
            if spelling != name:
                like -= _FARTHER * path.count(".")
            if like > best:
                best, meant = like, path
    return f"; did you mean `{meant}`?" if meant else ""


def _at(kind: Any, steps: Sequence[str]) -> Any:
    """Return the type that a path leads to inside a type."""
    for step in steps:
        kind = kind if step[0] == "[" else _fields(kind).get(step)
    return kind


def _fields(kind: Any) -> dict[str, Any]:
    """Return the types of the fields of a struct, or of the structs in a container."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return get_type_hints(kind)
    return {name: hint for part in get_args(kind) for name, hint in _fields(part).items()}


def _paths(kind: Any) -> Iterator[str]:
    """Yield the fields of a type and those inside them, as in rope.theta."""
    for name, hint in _fields(kind).items():
        yield name
        many = "[...]" if get_origin(hint) in (dict, tuple) else ""
        yield from (f"{name}{many}.{below}" for below in _paths(hint))
