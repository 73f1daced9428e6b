"""The header of a GGUF file: its metadata and where its tensors are.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is a magic number, counts,
pairs of key and value, descriptions of tensors, and their aligned bytes. The reader of the gguf
package trusts all counts, so a broken file could keep it busy for ever, and it makes several
arrays for each of a vocabulary's tokens. Here each count is held against the bytes that are left
before anything is read, and a header of 262,144 tokens takes a fraction of a second. The names and
sizes of types are those of the package.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from pympa.checkpoint.mapped import map_file
from pympa.checkpoint.tensors import StoredTensor
from pympa.errors import RefusedError
from pympa.text.escape import shown

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_BYTE_SWAPPED = 0xFFFF  # the lower half of a version of the other byte order is 0
_ALIGNMENT_KEY, _ALIGNMENT, _MOST_ALIGNMENT = "general.alignment", 32, 1 << 16
_MOST_HEADER_BYTES = 1 << 28  # a vocabulary of 262,144 tokens takes 6 MB
_MOST_KEYS, _MOST_TENSORS, _MOST_ELEMENTS = 1 << 16, 1 << 20, 1 << 22
_MOST_AXES = 4  # as in ggml
_KEY_BYTES, _TENSOR_BYTES, _STRING_BYTES = 13, 24, 8  # the least that one can take
_VALUE_TYPES, _TENSOR_TYPES = frozenset(GGUFValueType), frozenset(GGMLQuantizationType)
_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_ADVICE = "is it cut short, or still being copied? download it again"


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before the bytes of its tensors.

    Attributes:
        path: the file.
        metadata: the values by key: a number, a bool, a str, a list of str, or an array of numbers.
        tensors: the tensors by name; their dtypes are names of `gguf.GGMLQuantizationType`, and
            their shapes are `[outputs, inputs]`, the reverse of the order in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        path: the file.

    Raises:
        RefusedError: the file is not a whole, valid GGUF file of version 2 or 3, little-endian.
    """
    reader = _Reader(path, map_file(path))
    if reader.take(4, "magic number").tobytes() != _MAGIC:
        raise reader.wrong("expected the magic number GGUF", "another one, so it is no GGUF file")
    version = reader.number("<u4", "version")
    if version not in _VERSIONS:
        swapped = " (big-endian)" if not version & _BYTE_SWAPPED else ""
        raise reader.wrong("version: expected 2 or 3, little-endian", f"{version}{swapped}")
    tensors = reader.count("tensors", _MOST_TENSORS, _TENSOR_BYTES)
    keys = reader.count("metadata keys", _MOST_KEYS, _KEY_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text("a metadata key")
        if key in metadata:
            raise reader.wrong("metadata: expected each key once", f"{shown(key)} twice")
        metadata[key] = reader.value(key)
    entries = [_read_entry(reader) for _ in range(tensors)]
    alignment = metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT:
        raise reader.wrong(f"{_ALIGNMENT_KEY}: expected 1 to {_MOST_ALIGNMENT}", str(alignment))
    data = -(-reader.at // alignment) * alignment
    return GgufHeader(path, metadata, _placed(reader, entries, data, alignment))


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header describes it; the offset counts from the first tensor's bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int


class _Reader:
    """Reads a header from its start; nothing is read, or counted, beyond the end of the file."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.at = 0
        self.file_bytes = data.size
        self._data = data[:_MOST_HEADER_BYTES]

    def wrong(self, expected: str, got: str) -> RefusedError:
        """Return the refusal of this file."""
        return RefusedError(f"{shown(str(self.path))}: {expected}; got {got}")

    def take(self, nbytes: int, what: str) -> NDArray[np.uint8]:
        """Return the next bytes."""
        if nbytes > self._data.size - self.at:
            limit = "" if self._data.size == self.file_bytes else " of the longest header"
            raise self.wrong(
                f"expected {nbytes:,} bytes for {shown(what)}",
                f"{self._data.size - self.at:,} before the end{limit}; {_ADVICE}",
            )
        self.at += nbytes
        return self._data[self.at - nbytes : self.at]

    def number(self, kind: str, what: str) -> Any:
        """Return the next number of a NumPy dtype as a Python number."""
        return self.numbers(kind, 1, what)[0].item()

    def numbers(self, kind: str, count: int, what: str) -> NDArray[Any]:
        """Return a copy of the next numbers."""
        dtype = np.dtype("u1" if kind == "?" else kind)
        found = self.take(count * dtype.itemsize, what).view(dtype).copy()
        return found.astype(np.bool_) if kind == "?" else found

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """Return the next number, if so many things fit into the rest of the header."""
        number: int = self.number("<u8", f"the number of {what}")
        most = min(most, (self._data.size - self.at) // least_bytes)
        if number > most:
            raise self.wrong(
                f"{shown(what)}: expected at most {most:,} in this file", f"{number:,}; {_ADVICE}"
            )
        return number

    def text(self, what: str) -> str:
        """Return the next string."""
        return self._decoded(self.take(self.count(f"bytes of {what}", 1 << 30, 1), what), what)

    def texts(self, count: int, what: str) -> list[str]:
        """Return the next strings of an array, of which there are many."""
        data, at, found = self._data.data, self.at, []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + _STRING_BYTES > len(data):
                self.take(len(data), what)
            (length,) = unpack(data, at)
            at += _STRING_BYTES
            if length > len(data) - at:
                self.at = at
                self.take(length, what)
            found.append(self._decoded(data[at : at + length], what))
            at += length
        self.at = at
        return found

    def value(self, key: str) -> Any:
        """Return the value of a metadata key."""
        kind = self._kind(key)
        if kind is GGUFValueType.STRING:
            return self.text(key)
        if kind is not GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind], key)
        kind = self._kind(key)
        if kind is GGUFValueType.ARRAY:
            raise self.wrong(f"{shown(key)}: expected an array of numbers or texts", "of arrays")
        if kind is GGUFValueType.STRING:
            return self.texts(self.count(key, _MOST_ELEMENTS, _STRING_BYTES), key)
        scalar = _SCALARS[kind]
        count = self.count(key, _MOST_ELEMENTS, np.dtype(scalar).itemsize)
        return self.numbers(scalar, count, key)

    def _kind(self, key: str) -> GGUFValueType:
        number = self.number("<u4", f"the type of {key}")
        if number not in _VALUE_TYPES:
            raise self.wrong(f"{shown(key)}: expected a type of GGUF", f"number {number}")
        return GGUFValueType(number)

    def _decoded(self, text: Any, what: str) -> str:
        try:
            return str(text, "utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{shown(what)}: expected UTF-8", error.reason) from None


def _read_entry(reader: _Reader) -> _Entry:
    """Read the description of one tensor."""
    name = reader.text("a tensor's name")
    where = f"tensor {shown(name)}"
    axes = reader.number("<u4", f"the number of axes of {where}")
    if axes > _MOST_AXES:
        raise reader.wrong(f"{where}: expected at most {_MOST_AXES} axes", f"{axes:,}")
    shape = tuple(reversed(reader.numbers("<u8", axes, f"the shape of {where}").tolist()))
    number = reader.number("<u4", f"the type of {where}")
    if number not in _TENSOR_TYPES:
        raise reader.wrong(f"{where}: expected a type of ggml", f"number {number}")
    kind = GGMLQuantizationType(number)
    per_block = GGML_QUANT_SIZES[kind][0]
    if per_block > 1 and (not shape or shape[-1] % per_block):
        raise reader.wrong(
            f"{where}: {kind.name}: expected rows of a multiple of {per_block}", str(list(shape))
        )
    return _Entry(name, kind, shape, reader.number("<u8", f"the offset of {where}"))


def _placed(
    reader: _Reader, entries: list[_Entry], data: int, alignment: int
) -> dict[str, StoredTensor]:
    """Return the tensors by name, each within the file, aligned, and none over another."""
    found: dict[str, StoredTensor] = {}
    at = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        where = f"tensor {shown(entry.name)}"
        per_block, block_bytes = GGML_QUANT_SIZES[entry.kind]
        elements = 1
        for extent in entry.shape:
            elements *= extent
        nbytes = elements // per_block * block_bytes
        if entry.name in found:
            raise reader.wrong(f"{where}: expected one of this name", "two")
        if entry.offset % alignment:
            raise reader.wrong(f"{where}: expected an offset aligned to {alignment}", "another")
        if entry.offset < at:
            raise reader.wrong(f"{where}: expected bytes of its own", "bytes of another tensor")
        at = entry.offset + nbytes
        if data + at > reader.file_bytes:
            raise reader.wrong(
                f"{where}: expected a file of at least {data + at:,} bytes",
                f"{reader.file_bytes:,}; {_ADVICE}",
            )
        found[entry.name] = StoredTensor(
            entry.name, entry.kind.name, entry.shape, reader.path, data + entry.offset, nbytes
        )
    return found
