"""Read-only memory maps of files, each made once, when a tensor of it is first read."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pympa.checkpoint.tensors import StoredTensor
from pympa.errors import RefusedError
from pympa.text.escape import shown

_AHEAD_BYTES = 64 << 20  # of a file that the system reads while a tensor before them is converted


class _Map:
    """One file's map, of which the system reads parts ahead."""

    def __init__(self, path: Path) -> None:
        self._pages = _mapped(path)
        self.data = np.frombuffer(self._pages, np.uint8)
        self._asked = 0  # bytes from the start of the file, of which the system knows

    def read_ahead(self, start: int, stop: int) -> None:
        """Let the system read a part of the file, and some that follows, without waiting."""
        first = max(start, self._asked if self._asked < stop + _AHEAD_BYTES else start)
        first = first // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(stop + _AHEAD_BYTES, self.data.size)
        if first < last and hasattr(mmap, "MADV_WILLNEED"):
            self._pages.madvise(mmap.MADV_WILLNEED, first, last - first)
            self._asked = last


class MappedFiles:
    """The memory maps of some files. A map lives as long as this object or a view of it."""

    def __init__(self) -> None:
        self._maps: dict[Path, _Map] = {}

    def bytes_of(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """Return the bytes of a tensor, a view of the map of its file.

        Raises:
            RefusedError: the file cannot be mapped any more, or has become too short.
        """
        if tensor.nbytes == 0:
            return np.empty(0, np.uint8)
        if tensor.file not in self._maps:
            self._maps[tensor.file] = _Map(tensor.file)
        found, stop = self._maps[tensor.file], tensor.offset + tensor.nbytes
        if found.data.size < stop:
            raise RefusedError(
                f"{shown(str(tensor.file))}: expected {stop:,} bytes, as when it was opened; got "
                f"{found.data.size:,}"
            )
        found.read_ahead(tensor.offset, stop)
        return found.data[tensor.offset : stop]


def map_file(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file as a read-only memory map.

    Raises:
        RefusedError: the file is empty or cannot be mapped.
    """
    return np.frombuffer(_mapped(path), np.uint8)


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{shown(str(path))}: expected a file to map; got: {error}") from None
