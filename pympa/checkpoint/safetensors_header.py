"""The header of a safetensors file, checked before a byte of its tensors is mapped.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON
object, that object, and the bytes of all tensors without gaps. The safetensors package validates
it; offsets are read here, because the package hands out copies and pympa wants a memory map.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
import safetensors

from pympa.checkpoint.foreign import refused
from pympa.checkpoint.json_file import parse_json, read_bytes
from pympa.checkpoint.mapped import map_file
from pympa.checkpoint.tensors import FLOATS, StoredTensor
from pympa.errors import RefusedError
from pympa.text.escape import shown

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    **FLOATS,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""The dtypes of safetensors that can be read, by their names in a header."""

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the safetensors package has the same limit
_MOST_AXES = 8
_AGAIN = "is it cut short, or still being copied? download it again"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Args:
        path: the file.

    Raises:
        RefusedError: the file is not a whole, valid safetensors file, or has a dtype not in
            `DTYPES`.
    """
    where = shown(str(path))
    start = read_bytes(path, _LENGTH_BYTES, start=True)
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH_BYTES or length > _MOST_HEADER_BYTES:
        raise RefusedError(
            f"{where}: expected a safetensors file with a header of at most "
            f"{_MOST_HEADER_BYTES:,} bytes; got {_first_bytes(start, length)}; {_AGAIN}"
        )
    data = _LENGTH_BYTES + length
    text = read_bytes(path, data, start=True)[_LENGTH_BYTES:]
    file_bytes = map_file(path).size
    if len(text) < length:
        raise RefusedError(
            f"{where}: expected a header of {length:,} bytes; got {len(text):,}; {_AGAIN}"
        )
    found = {
        name: _entry(path, name, entry, data)
        for name, entry in parse_json(text, where).items()
        if name != "__metadata__"
    }
    end = max((tensor.offset + tensor.nbytes for tensor in found.values()), default=data)
    if end != file_bytes:
        raise RefusedError(
            f"{where}: expected {end:,} bytes, as the header says; got {file_bytes:,}; {_AGAIN}"
        )
    with refused(f"{where}: expected a valid safetensors file", _AGAIN):
        safetensors.safe_open(path, framework="np")
    return found


def _entry(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """Return a tensor, if its entry in the header agrees with itself."""
    where = f"{shown(str(path))}: tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise RefusedError(f"{where}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RefusedError(
            f"{where}: dtype: expected one of {', '.join(DTYPES)}; got {shown(str(dtype))}"
        )
    if not _is_numbers(shape) or len(shape) > _MOST_AXES:
        raise RefusedError(f"{where}: shape: expected at most {_MOST_AXES} sizes of 0 or more")
    if not _is_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise RefusedError(f"{where}: data_offsets: expected two offsets in ascending order")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise RefusedError(
            f"{where}: expected {nbytes:,} bytes for {dtype} {list(shape)}; got data_offsets of "
            f"{offsets[1] - offsets[0]:,}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, data + offsets[0], nbytes)


def _is_numbers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _first_bytes(start: bytes, length: int) -> str:
    if len(start) < _LENGTH_BYTES:
        return f"a file of {len(start)} bytes"
    if start.startswith((b"version ", b"PK\x03\x04")):
        kind = "a pointer of Git LFS (run: git lfs pull)" if start[0] == ord("v") else "an archive"
        return f"{kind}, not the tensors"
    return f"a header of {length:,} bytes"
