"""Read-only memory maps of files, each made once, when a tensor of it is first read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pympa.checkpoint.tensors import StoredTensor
from pympa.errors import RefusedError
from pympa.text.escape import shown


class MappedFiles:
    """The memory maps of some files. A map lives as long as this object or a view of it."""

    def __init__(self) -> None:
        self._maps: dict[Path, NDArray[np.uint8]] = {}

    def bytes_of(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """Return the bytes of a tensor, a view of the map of its file.

        Raises:
            RefusedError: the file cannot be mapped any more, or has become too short.
        """
        if tensor.nbytes == 0:
            return np.empty(0, np.uint8)
        if tensor.file not in self._maps:
            self._maps[tensor.file] = map_file(tensor.file)
        part = self._maps[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]
        if part.size < tensor.nbytes:
            raise RefusedError(
                f"{shown(str(tensor.file))}: expected {tensor.offset + tensor.nbytes:,} bytes, as "
                f"when it was opened; got {self._maps[tensor.file].size:,}"
            )
        return part


def map_file(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file as a read-only memory map.

    Raises:
        RefusedError: the file is empty or cannot be mapped.
    """
    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{shown(str(path))}: expected a file to map; got: {error}") from None
