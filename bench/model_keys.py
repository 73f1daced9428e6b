"""Write the reference of a model's keys in TOML, for README.md, from the specs themselves.

python bench/model_keys.py
"""

from __future__ import annotations

import re
import types
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from pympa.spec import (
    DynamicScaling,
    Latent,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    Rope,
    Routing,
    YarnScaling,
)

TABLES: dict[str, type[msgspec.Struct]] = {
    "the model": ModelSpec,
    "an entry of `[[layers]]`": LayerSpec,
    "`rope`": Rope,
    '`rope.scaling` with `kind = "linear"`': LinearScaling,
    '`rope.scaling` with `kind = "dynamic"`': DynamicScaling,
    '`rope.scaling` with `kind = "llama3"`': Llama3Scaling,
    '`rope.scaling` with `kind = "yarn"`': YarnScaling,
    '`rope.scaling` with `kind = "longrope"`': LongRopeScaling,
    "`latent`": Latent,
    "`routing`": Routing,
}
"""The tables of a file, with the spec of each."""

PATTERN = (
    "changes of the other keys, each for `repeat` layers (1), again and again until the entry's "
    "own `repeat` is full; that is then the number of all its layers."
)

_NAMES = {int: "whole number", float: "number", bool: "true or false"}


def reference() -> str:
    """Return the reference in Markdown."""
    return "\n\n".join(_table(title, spec) for title, spec in TABLES.items())


def _table(title: str, spec: type[msgspec.Struct]) -> str:
    head = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines = [f"**Keys of {title}.** {_summary(spec)}", "", *head]
    hints, meanings = get_type_hints(spec), _meanings(spec)
    for field in msgspec.structs.fields(spec):
        lines.append(
            f"| `{field.name}` | {_kind(hints[field.name])} | {_default(field)} | "
            f"{meanings[field.name]} |"
        )
    if spec is LayerSpec:
        lines.append(f"| `pattern` | list of tables | - | {PATTERN} |")
    return "\n".join(lines)


def _summary(spec: type[msgspec.Struct]) -> str:
    """Return what a docstring says before its attributes, in one line."""
    return " ".join((spec.__doc__ or "").partition("Attributes:")[0].split())


def _meanings(spec: type[msgspec.Struct]) -> dict[str, str]:
    """Return the text on each attribute in a docstring, in one line."""
    text = (spec.__doc__ or "").partition("Attributes:\n")[2]
    parts = re.split(r"^ {4,8}(\w+): ", text, flags=re.M)[1:]
    return {
        name: " ".join(meaning.split()).replace("|", r"\|")
        for name, meaning in zip(parts[::2], parts[1::2], strict=True)
    }


def _kind(hint: Any) -> str:
    """Return the type of a value in words."""
    if get_origin(hint) is Literal:
        return " or ".join(f'`"{choice}"`' for choice in get_args(hint))
    if get_origin(hint) in (types.UnionType, None) and hint in _NAMES:
        return _NAMES[hint]
    inner = [part for part in get_args(hint) if part not in (type(None), Ellipsis)]
    if get_origin(hint) is tuple:
        return "list of numbers" if inner == [float] else "list of tables"
    if inner and all(part in _NAMES for part in inner):
        return " or ".join(_NAMES[part] for part in inner)
    return "table"


def _default(field: Any) -> str:
    """Return the default of a key, as TOML has it."""
    if field.required:
        return "needed"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, msgspec.Struct):
        return "its defaults"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(reference())
