"""Weights in safetensors files: one file, or shards with an index, by memory maps.

Files must stay as they are while they are open: a page of a file that was cut short afterwards
cannot be read, and the system ends a process that tries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pympa.checkpoint.json_file import read_json
from pympa.checkpoint.mapped import MappedFiles
from pympa.checkpoint.model_directory import ModelFiles, find_model, member, optional_member
from pympa.checkpoint.safetensors_header import DTYPES, read_header
from pympa.checkpoint.tensors import Spans, StoredTensor, find_tensor, select
from pympa.errors import RefusedError
from pympa.text.escape import shown

_MOST_SHARDS = 10_000


class SafetensorsFiles:
    """The tensors of safetensors files; see `Tensors`.

    Args:
        where: the name of the file or directory for messages.
        stored: the tensors by name, of which the files have been checked.
    """

    def __init__(self, where: str, stored: Mapping[str, StoredTensor]) -> None:
        self.where = where
        self.stored = stored
        self._files = MappedFiles()

    def read(self, name: str, *spans: Spans) -> NDArray[Any]:
        """See `Tensors.read`."""
        tensor = find_tensor(self, name)
        return select(
            self._files.bytes_of(tensor).view(DTYPES[tensor.dtype]).reshape(tensor.shape), spans
        )


def open_safetensors(path: str | Path | ModelFiles) -> SafetensorsFiles:
    """Open the safetensors weights of a model; every header is checked before this returns.

    Args:
        path: a directory or a file, or what `find_model` found there.

    Raises:
        RefusedError: a file is missing, broken, or outside the directory; shards and index do not
            agree; or there are no safetensors files.
    """
    files = path if isinstance(path, ModelFiles) else find_model(path)
    if files.kind == "safetensors":
        return SafetensorsFiles(shown(str(files.weights)), read_header(files.weights))
    if files.kind == "index":
        return SafetensorsFiles(shown(str(files.directory)), _read_shards(files))
    raise RefusedError(
        f"{shown(str(files.weights))}: expected safetensors; got a {files.kind.upper()} file"
    )


def _read_shards(files: ModelFiles) -> dict[str, StoredTensor]:
    """Return the tensors of all shards that an index names."""
    where = shown(str(files.weights))
    shard_of = read_json(files.weights).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(f, str) for f in shard_of.values()):
        raise RefusedError(f"{where}: weight_map: expected an object of tensor names and files")
    shards = sorted(set(shard_of.values()))
    if len(shards) > _MOST_SHARDS:
        raise RefusedError(
            f"{where}: weight_map: expected at most {_MOST_SHARDS:,} files; got {len(shards):,}"
        )
    absent = [shard for shard in shards if optional_member(files.directory, shard) is None]
    if absent:
        raise RefusedError(
            f"{where}: expected {len(shards):,} files of weights; {len(absent):,} are missing, "
            f"the first is {shown(absent[0])}; download the model again"
        )
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(member(files.directory, shard)).items():
            if name in found:
                raise RefusedError(
                    f"{where}: tensor {shown(name)}: expected one file with it; got "
                    f"{shown(found[name].file.name)} and {shown(shard)}"
                )
            found[name] = tensor
    missing = [name for name in shard_of if name not in found]
    if missing:
        raise RefusedError(
            f"{where}: expected tensor {shown(missing[0])} in {shown(shard_of[missing[0]])}; the "
            f"file has none of this name ({len(missing):,} tensors are missing)"
        )
    return found
