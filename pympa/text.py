"""Text from files and command lines, as it may go to a terminal: nothing in it is a command."""

from __future__ import annotations

_LONGEST = 4000  # characters of a line; nobody reads more


def shown(text: str) -> str:
    """Return a text in one line, with what a terminal would act on escaped."""
    if not text.isprintable():
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
        )
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} ... ({len(text) - _LONGEST:,} characters more)"
