"""Files that users name: only regular ones, and only up to a size.

A pipe without a writer would make a job wait for ever, and /dev/zero would fill a node's memory.
So the kind of a file is checked first, opening never blocks, and each use has a largest size.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}
_AT_ONCE = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_PIECE_BYTES = 1 << 20


def read_file(path: str | Path, most_bytes: int, *, start: bool = False) -> bytes:
    """Return the contents of a regular file.

    Args:
        path: the path of the file.
        most_bytes: the largest size of the file in bytes.
        start: whether a longer file is allowed; then its first `most_bytes` are returned.

    Raises:
        OSError: the file is missing, not regular, or too long; `strerror` says it in words.
    """
    _refuse_kinds(_status(path), "a regular file", stat.S_ISREG)
    file = os.open(path, os.O_RDONLY | _AT_ONCE)
    try:
        _refuse_kinds(os.fstat(file), "a regular file", stat.S_ISREG)  # it may have changed
        text = bytearray()
        while piece := os.read(file, min(_PIECE_BYTES, most_bytes + 1 - len(text))):
            text += piece
    finally:
        os.close(file)
    if len(text) > most_bytes and not start:
        raise _wrong(f"expected at most {most_bytes:,} bytes; the file has more")
    return bytes(text[:most_bytes])


def open_to_append(path: str, flags: int) -> int:
    """Open a file for writing, as `opener` of `open`: a new one, a regular one, or /dev/null.

    Character devices are allowed, because they accept all that is written; a pipe may have no
    reader.

    Raises:
        OSError: the file is none of these, or cannot be written; `strerror` says it in words.
    """
    expected = "a new or a regular file, or a device such as /dev/null"
    if os.path.lexists(path):
        _refuse_kinds(_status(path), expected, _takes_bytes)
    file = os.open(path, flags | _AT_ONCE, 0o666)
    try:
        _refuse_kinds(os.fstat(file), expected, _takes_bytes)
        os.set_blocking(file, True)
    except OSError:
        os.close(file)
        raise
    return file


def refuse_special(path: str | Path) -> None:
    """Refuse to overwrite anything but a regular file, /dev/null included.

    Raises:
        OSError: the path is not a regular file; `strerror` says it in words.
    """
    if os.path.exists(path):
        _refuse_kinds(_status(path), "a new file or a regular one to replace", stat.S_ISREG)


def _takes_bytes(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISCHR(mode)


def _status(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)
    except ValueError as error:  # a name with a zero byte
        raise _wrong(str(error)) from None


def _refuse_kinds(status: os.stat_result, expected: str, allowed: Callable[[int], bool]) -> None:
    mode = status.st_mode
    if not allowed(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise _wrong(f"expected {expected}; got {kind}")


def _wrong(text: str) -> OSError:
    """Return an OSError with our text as `strerror`."""
    return OSError(0, text)
