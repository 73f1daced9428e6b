"""Text from files and command lines, made safe for a terminal: control characters are escaped."""

from __future__ import annotations

_LONGEST = 4000  # characters of a line


def shown(text: str) -> str:
    """Return a text in one line, with characters escaped that control a terminal."""
    if not text.isprintable():
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
        )
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} ... ({len(text) - _LONGEST:,} characters more)"
