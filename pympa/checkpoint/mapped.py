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
    """One file's map. The system reads parts of it ahead, and may forget those of before."""

    def __init__(self, path: Path) -> None:
        self._pages = _mapped(path)
        self.data = np.frombuffer(self._pages, np.uint8)
        self._now = (0, 0)

    def move_to(self, start: int, stop: int) -> None:
        """Ask for a part of the file and for some that follows, without waiting for it.

        What was read before no longer counts as memory of this process; it stays in the system's
        cache of files, which ranks share. It is read again where it is used again.
        """
        self._advise("MADV_DONTNEED", *self._now)
        if (start, stop) != self._now:
            self._advise("MADV_WILLNEED", start, min(stop + _AHEAD_BYTES, self.data.size))
            self._now = (start, stop)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if first < stop and hasattr(mmap, advice):
            self._pages.madvise(getattr(mmap, advice), first, stop - first)


class MappedFiles:
    """The memory maps of some files. A map lives as long as this object or a view of it.

    Args:
        streams: whether tensors are read one after the other, as when they are loaded.
    """

    def __init__(self, *, streams: bool = True) -> None:
        self._streams = streams
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
        if self._streams:
            found.move_to(tensor.offset, stop)
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
