"""JSON of model directories, which strangers write: bounded, and refused in one line.

`json` raises RecursionError for deep nesting and a hint for programmers for a number of 5,000
digits, and takes the last of two equal names in silence. A file that says two things is refused
here, and so is a number that no field of a checkpoint can hold.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pympa.errors import RefusedError
from pympa.text.escape import shown
from pympa.text.files import read_file

MOST_JSON_BYTES = 1 << 28  # the vocabularies of today have 33 MB, indexes of shards 9 MB
_MOST_LEVELS = 64  # of nested brackets: published configurations have 6
_MOST_BITS = 128  # of a whole number: many a tokenizer_config.json has int(1e30) for "no limit"
_DIGITS = 39  # of a whole number of 128 bits


def read_bytes(path: Path, most_bytes: int = MOST_JSON_BYTES, *, start: bool = False) -> bytes:
    """Return the contents of a regular file.

    Args:
        path: the path of the file.
        most_bytes: the largest size of the file in bytes.
        start: whether a longer file is allowed; then its first `most_bytes` are returned.

    Raises:
        RefusedError: the file is missing, not regular, or too long.
    """
    try:
        return read_file(path, most_bytes, start=start)
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RefusedError(f"{shown(str(path))}: {shown(why)}") from None


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the path of the file.
        most_bytes: the largest size of the file in bytes.

    Raises:
        RefusedError: the file cannot be read, or see `parse_json`.
    """
    return parse_json(read_bytes(path, most_bytes), shown(str(path)))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Decode one JSON object.

    Args:
        text: the document, UTF-8.
        where: the file name for messages.

    Raises:
        RefusedError: the text is not JSON, is no object, is nested too deeply, has a name twice in
            an object, or has a whole number beyond 128 bits.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_int=_whole)
    except RecursionError:
        raise RefusedError(_too_deep(where)) from None
    except ValueError as error:
        raise RefusedError(f"{where}: expected JSON; got: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise RefusedError(f"{where}: expected a JSON object, {{...}}; got {_kind(value)}")
    _refuse_depth(value, where)
    return value


def text_of(values: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return a text in a JSON object, or None if it has none or null.

    Raises:
        RefusedError: the value is something else.
    """
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise RefusedError(f"{where}: {name}: expected a text; got {_kind(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; a name that stands in it twice is refused."""
    made = dict(pairs)
    if len(made) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice!r} twice in one object")
    return made


def _whole(digits: str) -> int:
    """Return a whole number that is not absurdly long."""
    if len(digits.lstrip("-")) <= _DIGITS:
        number = int(digits)
        if number.bit_length() <= _MOST_BITS:
            return number
    raise ValueError(
        f"a whole number of {len(digits):,} digits, where {_MOST_BITS} bits are the most"
    )


def _refuse_depth(value: Any, where: str) -> None:
    """Refuse nesting on which readers of a document would recurse for too long."""
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise RefusedError(_too_deep(where))


def _too_deep(where: str) -> str:
    return f"{where}: expected at most {_MOST_LEVELS} levels of brackets; got more"


def _kind(value: Any) -> str:
    """Return the name of a JSON value's kind."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    return kinds.get(type(value), "a number")
