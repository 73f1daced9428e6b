"""What models in TOML have besides fields: `rope = false`, and repeating patterns of layers.

    [[layers]]
    repeat = 26
    heads = 8
    pattern = [{ window = 512, repeat = 5 }, { rope = { theta = 1e6 } }]

describes 26 layers, of which five have a window and the sixth has another theta, again and again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from pympa.spec import MOST_LAYERS, SpecError

Values = dict[str, Any]
"""The values of a table."""


def plain_model(value: Any) -> Any:
    """Return decoded TOML with patterns of layers written out, and None for `rope = false`.

    Raises:
        SpecError: a pattern is not a list of tables, or has too many layers.
    """
    if isinstance(value, list):
        return [plain_model(part) for part in value]
    if not isinstance(value, dict):
        return value
    found = {name: plain_model(part) for name, part in value.items()}
    if found.get("rope") is False:
        found["rope"] = None
    if isinstance(found.get("layers"), list):
        found["layers"] = [layer for entry in found["layers"] for layer in _written_out(entry)]
    return found


def _written_out(entry: Any) -> Iterator[Any]:
    """Yield the layers of an entry of `layers`: itself, unless it has a pattern."""
    if not isinstance(entry, dict) or "pattern" not in entry:
        yield entry
        return
    pattern = entry["pattern"]
    if not (isinstance(pattern, list) and pattern and all(isinstance(p, dict) for p in pattern)):
        raise SpecError("layers: pattern: expected a list of tables, as in [{ window = 512 }, {}]")
    counts = [_count(part, "layers: pattern: repeat", 1) for part in pattern]
    left = _count(entry, "layers: repeat", sum(counts))
    shared = {name: value for name, value in entry.items() if name != "pattern"}
    for part, count in itertools.cycle(zip(pattern, counts, strict=True)):
        yield shared | part | {"repeat": min(count, left)}
        left -= min(count, left)
        if not left:
            return


def _count(table: Values, what: str, default: int) -> int:
    count = table.get("repeat", default)
    if type(count) is not int or not 1 <= count <= MOST_LAYERS:
        raise SpecError(f"{what}: expected a whole number from 1 to {MOST_LAYERS:,}; got {count!r}")
    return count
