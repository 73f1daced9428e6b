"""Weights that a program already has in memory, as tensors of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.checkpoint.tensors import Spans, StoredTensor, find_tensor, select

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


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
        self._arrays, self._on_host = arrays, on_host
        self.stored: Mapping[str, StoredTensor] = {
            name: StoredTensor(
                name,
                _dtype_name(array),
                tuple(int(size) for size in array.shape),
                Path("weights"),
                0,
                int(np.prod(array.shape, dtype=np.int64)) * 2,
            )
            for name, array in arrays.items()
        }

    @property
    def identity(self) -> str:
        """A text that tells these arrays from others, by their names and first elements."""
        digest = hashlib.sha256()
        for name in sorted(self.stored):
            stored = self.stored[name]
            first = self.read(name, *([(0, 1)] for _ in stored.shape[:-1]))
            digest.update(repr((name, stored.dtype, stored.shape)).encode() + first.tobytes())
        return f"arrays {digest.hexdigest()[:16]}"

    def read(self, name: str, *spans: Spans) -> NDArray[Any]:
        """See `Tensors.read`."""
        find_tensor(self, name)
        return select(self._on_host(self._arrays[name], f"weights[{name!r}]"), spans)


def _dtype_name(array: Any) -> str:
    name = str(array.dtype).removeprefix("torch.")
    return _NAMES.get(name, name)
