"""Weights in a GGUF file, or in the parts of a split one, by memory maps.

Plain numbers are views of the map. Quantised rows are widened to float32 by the gguf package, in
whole blocks of 32 to 256 columns, of which the ones that were not asked for are cut off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from pympa.checkpoint.gguf_header import GgufHeader, read_gguf_header
from pympa.checkpoint.mapped import MappedFiles
from pympa.checkpoint.model_directory import ModelFiles, find_model, gguf_parts
from pympa.checkpoint.tensors import (
    FLOATS,
    Spans,
    StoredTensor,
    check_spans,
    find_tensor,
    select,
)
from pympa.errors import RefusedError
from pympa.text.escape import shown

_PLAIN: dict[str, np.dtype[Any]] = {
    **FLOATS,
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_PARTS_KEY, _MOST_PARTS = "split.count", 10_000


class GgufFile:
    """The tensors and the metadata of a GGUF file; see `Tensors`.

    Args:
        headers: the header of the file, or those of its parts in order.
    """

    def __init__(self, headers: list[GgufHeader]) -> None:
        self.where = shown(str(headers[0].path))
        self.metadata: Mapping[str, Any] = headers[0].metadata
        self.stored: dict[str, StoredTensor] = {}
        for header in headers:
            for name, tensor in header.tensors.items():
                if name in self.stored:
                    raise RefusedError(
                        f"{self.where}: tensor {shown(name)}: expected one part with it; got "
                        f"{shown(self.stored[name].file.name)} and {shown(header.path.name)}"
                    )
                self.stored[name] = tensor
        self._files = MappedFiles()
        for tensor in self.stored.values():
            _refuse_without_widening(tensor)

    def read(self, name: str, *spans: Spans) -> NDArray[Any]:
        """See `Tensors.read`; quantised tensors are float32."""
        tensor = find_tensor(self, name)
        data = self._files.bytes_of(tensor)
        if tensor.dtype in _PLAIN:
            return select(data.view(_PLAIN[tensor.dtype]).reshape(tensor.shape), spans)
        return _widened(tensor, data, spans)


def open_gguf(path: str | Path | ModelFiles) -> GgufFile:
    """Open a GGUF file, with the other parts if it is split; all headers are checked first.

    Args:
        path: the file, its directory, or what `find_model` found there.

    Raises:
        RefusedError: a file is missing or broken, or its types of quantisation cannot be widened.
    """
    files = path if isinstance(path, ModelFiles) else find_model(path)
    if files.kind != "gguf":
        raise RefusedError(f"{shown(str(files.weights))}: expected a GGUF file; got {files.kind}")
    first = read_gguf_header(files.weights)
    count = first.metadata.get(_PARTS_KEY, 0)
    if type(count) is not int or count > _MOST_PARTS:
        raise RefusedError(
            f"{shown(str(files.weights))}: {_PARTS_KEY}: expected at most {_MOST_PARTS:,}; got "
            f"{shown(str(count))}"
        )
    if count <= 1:
        return GgufFile([first])
    return GgufFile([read_gguf_header(part) for part in gguf_parts(files.weights, count)])


def _widened(
    tensor: StoredTensor, data: NDArray[np.uint8], spans: tuple[Spans, ...]
) -> NDArray[np.float32]:
    """Return a part of a quantised tensor as float32."""
    check_spans(tensor.shape, spans)
    kind = GGMLQuantizationType[tensor.dtype]
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = tensor.shape[-1] // per_block
    whole: list[Spans] = [*spans, *[None] * (len(tensor.shape) - len(spans))]
    rows = select(data.reshape(*tensor.shape[:-1], blocks * block_bytes), whole[:-1])
    columns, parts = whole[-1], []
    for start, stop in [(0, tensor.shape[-1])] if columns is None else columns:
        first, last = start // per_block, math.ceil(stop / per_block)
        stored = np.ascontiguousarray(rows[..., first * block_bytes : last * block_bytes])
        values = _dequantized(stored, kind)
        parts.append(values[..., start - first * per_block : stop - first * per_block])
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts or [np.empty((*rows.shape[:-1], 0), np.float32)], axis=-1)


def _dequantized(stored: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Return the values of whole blocks; a scale that is not finite is passed on."""
    if stored.size == 0:
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        return np.empty((*stored.shape[:-1], stored.shape[-1] // block_bytes * per_block), "f4")
    with np.errstate(all="ignore"):
        values: NDArray[np.float32] = gguf.quants.dequantize(stored, kind)
    return values


def _refuse_without_widening(tensor: StoredTensor) -> None:
    """Refuse a type of quantisation that the gguf package knows only by name."""
    if tensor.dtype in _PLAIN:
        return
    kind = GGMLQuantizationType[tensor.dtype]
    try:
        _dequantized(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise RefusedError(
            f"{shown(str(tensor.file))}: tensor {shown(tensor.name)}: expected a type of "
            f"quantisation that the gguf package widens; got {tensor.dtype}"
        ) from None
