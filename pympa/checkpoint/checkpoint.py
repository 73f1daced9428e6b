"""A model directory, opened: what it describes, and its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pympa.checkpoint.families import Description, describe
from pympa.checkpoint.fingerprint import fingerprint
from pympa.checkpoint.json_file import read_json
from pympa.checkpoint.model_directory import INDEX, ModelFiles, find_model, member
from pympa.checkpoint.places import Places, family_places, find_places, stored_bytes
from pympa.checkpoint.safetensors_files import open_safetensors
from pympa.checkpoint.source import CheckpointSource
from pympa.checkpoint.tensors import Tensors
from pympa.checkpoint.widened import widened
from pympa.spec import ModelSpec
from pympa.text.escape import shown

if TYPE_CHECKING:
    from pympa.checkpoint.tokenizer import Tokenizer

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model with its weights.

    Attributes:
        where: the path that the user gave.
        files: the files of the weights.
        description: the family, the model, and the fields that were ignored.
        source: the weights.
        stored_bytes: the bytes of the weights in files.
    """

    where: str
    files: ModelFiles
    description: Description
    source: CheckpointSource
    stored_bytes: int

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer; None if the directory has none.

        Raises:
            RefusedError: its files are broken, or of a kind that is not known.
        """
        from pympa.checkpoint.tokenizer_files import has_tokenizer, read_tokenizer

        if self.files.kind == "gguf":
            from pympa.checkpoint.gguf_file import open_gguf
            from pympa.checkpoint.gguf_tokenizer import gguf_tokenizer

            file = open_gguf(self.files)
            if "tokenizer.ggml.model" not in file.metadata:
                return None
            return gguf_tokenizer(file.metadata, file.where)
        directory = self.files.directory
        return read_tokenizer(directory) if has_tokenizer(directory) else None

    @property
    def dtype(self) -> str | None:
        """The name of the dtype that the files declare; None if it is none of ours."""
        return self.description.dtype

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.description.spec


def open_checkpoint(path: str | Path, ignore_fields: Iterable[str] = ()) -> Checkpoint:
    """Open a model directory; everything about it is checked before this returns.

    Weights are mapped, not read.

    Args:
        path: a directory with config.json and safetensors, or a GGUF file.
        ignore_fields: the names of unknown fields of config.json to go on without.

    Raises:
        RefusedError: a file is missing or broken, the family or a field is unknown, or tensors are
            missing, of a wrong shape, or not used; the message names it.
    """
    files = find_model(_directory_of(path))
    if files.kind == "gguf":
        return _open_gguf(str(path), files)
    values = read_config(files.directory)
    description = describe(values, _where(files.directory), ignore_fields)
    stored = open_safetensors(files)
    tensors = widened(stored, values.get("quantization_config"))
    places = family_places(description, tensors)
    return _checkpoint(str(path), files, description, stored, tensors, places)


def _open_gguf(path: str, files: ModelFiles) -> Checkpoint:
    from pympa.checkpoint.gguf_file import open_gguf
    from pympa.checkpoint.gguf_model import describe_gguf
    from pympa.checkpoint.gguf_names import gguf_tensors
    from pympa.checkpoint.gguf_rope import FREQUENCIES

    file = open_gguf(files)
    description = describe_gguf(file)
    known = dict(gguf_tensors(description.spec, file.stored))
    places = find_places(description.spec, known, file, FREQUENCIES)
    return _checkpoint(path, files, description, file, file, places)


def _checkpoint(
    path: str,
    files: ModelFiles,
    description: Description,
    stored: Tensors,
    tensors: Tensors,
    places: Places,
) -> Checkpoint:
    source = CheckpointSource(tensors, places, f"checkpoint {fingerprint(stored)}")
    return Checkpoint(path, files, description, source, stored_bytes(tensors, places))


def describe_directory(path: str | Path, ignore_fields: Iterable[str] = ()) -> Description:
    """Return what the config.json of a directory describes; weights need not be there.

    A GGUF file, or a directory that has no config.json beside one, describes itself.

    Raises:
        RefusedError: the file is missing or broken, or the family or a field is unknown.
    """
    directory = Path(_directory_of(path))
    has_config = (directory / CONFIG).exists()
    if not directory.is_dir() or (not has_config and any(directory.glob("*.gguf"))):
        return open_checkpoint(path, ignore_fields).description
    return describe(read_config(directory), _where(directory), ignore_fields)


def _directory_of(path: str | Path) -> str | Path:
    """Return the directory of a config.json, or another path as it is."""
    return Path(path).parent if Path(path).name == CONFIG else path


def read_config(directory: Path) -> dict[str, Any]:
    """Return the fields of a directory's config.json.

    Raises:
        RefusedError: the file is missing or broken.
    """
    return read_json(member(directory, CONFIG))


def is_model_path(name: str) -> bool:
    """Return whether a name is that of a model directory or a file of weights, not of ours."""
    path = Path(name)
    try:
        by_name = path.suffix in (".safetensors", ".gguf") or path.name in (CONFIG, INDEX)
        return path.is_dir() or by_name
    except (OSError, ValueError):
        return False


def _where(directory: Path) -> str:
    return shown(str(directory / CONFIG))
