"""The tensors of a checkpoint: what is stored, and reading any part of it.

Families of models know names and shapes; formats of files know bytes. Between them stand a
mapping from names to `StoredTensor`s and one method, `read`, which takes the spans of each axis: a
rank reads only what it keeps. Where a format stores numbers as they are, a read is a view of a
memory map, so that ranks of a node share its pages and nothing is copied twice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pympa.errors import RefusedError
from pympa.plan.layout import Bounds
from pympa.text.escape import shown

Spans = Sequence[Bounds] | None
"""The (start, stop) of parts of an axis, one after the other; None means the whole axis."""
FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
}
"""The dtypes in which a weight may be stored as it is, by their names in files."""
_LONGEST_NAME = 200  # of a tensor for which another one is suggested


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: the name in the file.
        dtype: the name of the dtype in the file, as in "BF16" or "Q4_K".
        shape: the shape of the tensor's values, `[outputs, inputs]` for a linear weight.
        file: the file that holds the tensor.
        offset: the first byte of the tensor in the file.
        nbytes: the number of bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class Tensors(Protocol):
    """The tensors of a checkpoint, whatever the format of its files."""

    @property
    def where(self) -> str:
        """The name of the file or directory for messages."""

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """The tensors by name."""

    def read(self, name: str, *spans: Spans) -> NDArray[Any]:
        """Return a part of a tensor.

        Args:
            name: the name of the tensor.
            spans: the spans of each axis, from the first; axes left out are read whole.

        Returns:
            An array with the number of axes of the tensor; read-only if it is a view of the file.
            Its dtype is the stored one, or float32 where the file holds no plain numbers.

        Raises:
            RefusedError: there is no such tensor, or its file has changed since it was opened.
        """


def find_tensor(tensors: Tensors, name: str, shape: tuple[int, ...] | None = None) -> StoredTensor:
    """Return the description of a tensor.

    Args:
        tensors: the checkpoint.
        name: the name of the tensor.
        shape: the shape that it must have, if one is known.

    Raises:
        RefusedError: there is no such tensor, or it has another shape.
    """
    found = tensors.stored.get(name)
    if found is None:
        raise RefusedError(
            f"{tensors.where}: expected a tensor {shown(name)}; got none of this name"
            f"{_suggestion(name, tensors.stored)}"
        )
    if shape is not None and found.shape != tuple(shape):
        raise RefusedError(
            f"{shown(str(found.file))}: tensor {shown(name)}: expected the shape {list(shape)}; "
            f"got {list(found.shape)}; do config.json and the weights belong together?"
        )
    return found


def select(array: NDArray[Any], spans: Sequence[Spans]) -> NDArray[Any]:
    """Return a part of an array: a view if each axis has one span, else a copy.

    Args:
        array: the array.
        spans: the spans of each axis, from the first; axes left out are taken whole.

    Raises:
        ValueError: spans are not within the array.
    """
    check_spans(array.shape, spans)
    if all(of_axis is None or len(of_axis) == 1 for of_axis in spans):
        return array[tuple(slice(None) if part is None else slice(*part[0]) for part in spans)]
    out = np.empty(selected_shape(array.shape, spans), array.dtype)
    for places in product(*map(_placed, spans, array.shape)):
        to, of = zip(*places, strict=True)
        out[to] = array[of]
    return out


def selected_shape(shape: Sequence[int], spans: Sequence[Spans]) -> tuple[int, ...]:
    """Return the shape of the part of an array that spans select."""
    whole = [*spans, *[None] * (len(shape) - len(spans))]
    return tuple(
        extent if part is None else sum(stop - start for start, stop in part)
        for extent, part in zip(shape, whole, strict=True)
    )


def check_spans(shape: Sequence[int], spans: Sequence[Spans]) -> None:
    """Refuse spans that are not within an array.

    Raises:
        ValueError: a span is not within its axis, or there are more of them than axes.
    """
    if len(spans) > len(shape):
        raise ValueError(f"spans: expected at most {len(shape)} axes; got {len(spans)}")
    for axis, (of_axis, extent) in enumerate(zip(spans, shape, strict=False)):
        for start, stop in of_axis or ():
            if not 0 <= start <= stop <= extent:
                raise ValueError(
                    f"spans: axis {axis}: expected spans within {extent}; got {start} to {stop}"
                )


def _placed(of_axis: Spans, extent: int) -> Iterator[tuple[slice, slice]]:
    """Yield where each span goes and where it comes from."""
    at = 0
    for start, stop in [(0, extent)] if of_axis is None else of_axis:
        yield slice(at, at + stop - start), slice(start, stop)
        at += stop - start


def _suggestion(name: str, names: Mapping[str, StoredTensor]) -> str:
    """Return a hint with the most similar name of the last part of a tensor's name."""
    if len(name) > _LONGEST_NAME:
        return ""
    last = name.split(".")[-1]
    near = [other for other in names if last in other][:1000] or list(names)[:1000]
    best = difflib.get_close_matches(name, near, 1)
    return f"; the nearest is {shown(best[0])}" if best else ""
