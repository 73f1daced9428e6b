"""The weights of a checkpoint as a `WeightSource`: a rank reads only the rows and columns it keeps.

Files are memory-mapped, so the ranks of a node share one copy of them in the page cache. A part
that lies there as a kernel wants it is packed straight from the map; others are converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pympa.checkpoint.names import Part, Rows
from pympa.checkpoint.places import Places
from pympa.checkpoint.tensors import FLOATS, Spans, Tensors
from pympa.errors import RefusedError
from pympa.model.weights import WeightSpec
from pympa.plan.layout import Bounds
from pympa.text.escape import shown

_PIECE_ELEMENTS = 1 << 20  # elements that are converted at once: 4 MB of float32


class CheckpointSource:
    """A `WeightSource` of stored tensors.

    Args:
        tensors: the stored tensors, all of plain numbers.
        places: the place of each tensor of the model.
        identity: the text that identifies the weights.
    """

    def __init__(self, tensors: Tensors, places: Places, identity: str) -> None:
        self._tensors, self._places, self._identity = tensors, places, identity

    @property
    def identity(self) -> str:
        """See `WeightSource.identity`."""
        return self._identity

    def read(
        self,
        spec: WeightSpec,
        out: NDArray[Any],
        rows: Sequence[Bounds] | None = None,
        cols: Sequence[Bounds] | None = None,
    ) -> NDArray[Any]:
        """See `WeightSource.read`."""
        part, at = self._places[spec.name], 0
        width = out.shape[1] if out.ndim == 2 else 1
        spans = [(0, spec.shape[0])] if rows is None else rows
        cols = cols if out.ndim == 2 else None
        if out.size == 0:
            return out
        if FLOATS.get(self._tensors.stored[part.name].dtype) == out.dtype and len(spans) == 1:
            found = self._read(part, spans[0], cols)
            if found.strides[-1] == found.itemsize and found.flags.aligned:
                return found
        for first, last in spans:
            for start, stop in _pieces(first, last, max(1, _PIECE_ELEMENTS // width), part.rows):
                found = self._read(part, (start, stop), cols)
                self._store(part.name, found, out[at : at + stop - start])
                at += stop - start
        return out

    def _store(self, name: str, found: NDArray[Any], out: NDArray[Any]) -> None:
        """Round numbers to the dtype of the model.

        Raises:
            RefusedError: the dtype does not hold a number.
        """
        if out.dtype == np.float16 and found.dtype == ml_dtypes.bfloat16:
            found = found.astype(np.float32)  # which tells when it rounds a number to infinity
        try:
            with np.errstate(over="raise"):
                out[...] = found
        except FloatingPointError:
            raise RefusedError(
                f"{self._tensors.where}: tensor {shown(name)}: expected numbers that {out.dtype} "
                f"holds; got one of size {float(np.abs(found).max()):.3g}; choose another dtype"
            ) from None

    def _read(self, part: Part, rows: Bounds, cols: Spans) -> NDArray[Any]:
        """Return rows and columns of a tensor of the model, as they are stored."""
        lying, skip = _lying_rows(part.rows, rows)
        stored = self._tensors.stored[part.name]
        matrix = len(stored.shape) - (part.expert is not None)
        spans: list[Spans] = [[lying], cols][:matrix]
        if part.transposed:
            spans.reverse()
        if part.expert is not None:
            spans.insert(0, [(part.expert, part.expert + 1)])
        found = self._tensors.read(part.name, *spans)
        if part.expert is not None:
            found = found[0]
        if part.transposed:
            found = found.T
        return found if skip is None else _picked(found, skip, rows)


def _lying_rows(rows: Rows | None, wanted: Bounds) -> tuple[Bounds, Rows | None]:
    """Return stored rows that contain the wanted ones, and their pattern if others lie between."""
    first, last = wanted
    if rows is None:
        return wanted, None
    block, stride, offset = rows
    if stride == 0 or first // block == (last - 1) // block:
        start = first // block * stride + first % block + offset
        return (start, start + last - first), None
    begin = first // block
    blocks = (last - 1) // block + 1 - begin
    start = begin * stride + offset
    return (start, start + (blocks - 1) * stride + block), rows


def _picked(found: NDArray[Any], rows: Rows, wanted: Bounds) -> NDArray[Any]:
    """Return the wanted rows of stored ones, which begin at a block."""
    numbers = np.arange(*wanted)
    numbers -= wanted[0] // rows.block * rows.block
    picked: NDArray[Any] = found[numbers // rows.block * rows.stride + numbers % rows.block]
    return picked


def _pieces(first: int, last: int, most: int, rows: Rows | None) -> Iterator[Bounds]:
    """Cut rows into pieces of at most `most`, at the ends of blocks where there are any."""
    block = 1 if rows is None or rows.stride == 0 else rows.block
    step = max(most // block * block, min(block, most))
    while first < last:
        stop = min(last, (first // step + 1) * step if block > 1 else first + step)
        yield first, stop
        first = stop
