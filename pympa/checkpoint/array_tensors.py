"""Weights that a program already has in memory, as tensors of a checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.checkpoint.tensors import FLOATS, Spans, StoredTensor, find_tensor, select
from pympa.errors import RefusedError
from pympa.text.escape import shown

_DTYPES = {dtype.name: name for name, dtype in FLOATS.items()}
_SAMPLED = 16  # rows of an array, by which ranks compare theirs


class ArrayTensors:
    """Arrays in memory; see `Tensors`.

    Args:
        arrays: the arrays by name, of the names that the family's files have.
        on_host: a function that returns an array in the memory of the host, given its name.
    """

    where = "weights"

    def __init__(
        self, arrays: Mapping[str, Any], on_host: Callable[[Any, str], NDArray[Any]]
    ) -> None:
        if not isinstance(arrays, Mapping) or not all(isinstance(name, str) for name in arrays):
            raise RefusedError(f"weights: expected arrays by name; got {type(arrays).__name__}")
        self._arrays, self._on_host = arrays, on_host
        self._name: str | None = None  # of the array that was read last, in parts
        self._last: NDArray[Any] = np.empty(0)
        self.stored: Mapping[str, StoredTensor] = {
            name: _described(name, array) for name, array in arrays.items()
        }

    @property
    def identity(self) -> str:
        """A text that tells these arrays from others, by their names and a sample of rows."""
        digest = hashlib.sha256()
        for name in sorted(self.stored):
            stored = self.stored[name]
            digest.update(repr((name, stored.dtype, stored.shape)).encode())
            rows = sorted({round(row) for row in np.linspace(0, stored.shape[0] - 1, _SAMPLED)})
            for row in rows:
                digest.update(self.read(name, [(row, row + 1)]).tobytes())
        return f"arrays {digest.hexdigest()[:16]}"

    def read(self, name: str, *spans: Spans) -> NDArray[Any]:
        """See `Tensors.read`."""
        find_tensor(self, name)
        if name != self._name:
            self._last = np.empty(0)
            self._last = self._on_host(self._arrays[name], f"weights[{name!r}]")
            self._name = name
        return select(self._last, spans)


def _described(name: str, array: Any) -> StoredTensor:
    """Return the description of an array.

    Raises:
        RefusedError: it is no array of floating-point numbers.
    """
    dtype = str(getattr(array, "dtype", type(array).__name__)).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise RefusedError(
            f"weights[{shown(repr(name))}]: expected an array of {', '.join(_DTYPES)}; "
            f"got {shown(dtype)}"
        )
    shape = tuple(int(size) for size in array.shape)
    if not shape:
        raise RefusedError(f"weights[{shown(repr(name))}]: expected an axis; got a number")
    known = _DTYPES[dtype]
    nbytes = math.prod(shape) * FLOATS[known].itemsize
    return StoredTensor(name, known, shape, Path("weights"), 0, nbytes)
