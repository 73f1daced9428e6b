"""The weights and the tokenizer of a model, each opened alone, whatever the format of its files."""

from __future__ import annotations

from pathlib import Path

from pympa.checkpoint.gguf_file import open_gguf
from pympa.checkpoint.gguf_tokenizer import gguf_tokenizer
from pympa.checkpoint.model_directory import find_model
from pympa.checkpoint.safetensors_files import open_safetensors
from pympa.checkpoint.tensors import Tensors
from pympa.checkpoint.tokenizer import Tokenizer
from pympa.checkpoint.tokenizer_files import has_tokenizer, read_tokenizer


def open_tensors(path: str | Path) -> Tensors:
    """Open the weights that a path names, as they are stored; see `find_model`.

    Args:
        path: a model directory, a safetensors file, or a GGUF file.

    Returns:
        The tensors; quantised ones of safetensors are seen as plain ones through `widened`.

    Raises:
        RefusedError: see `find_model`, `open_safetensors` and `open_gguf`.
    """
    files = find_model(path)
    return open_gguf(files) if files.kind == "gguf" else open_safetensors(files)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of the model that a path names.

    A GGUF file that is named itself has its own; in a directory tokenizer.json comes first.

    Args:
        path: a model directory, a safetensors file, or a GGUF file.

    Raises:
        RefusedError: see `find_model`, `read_tokenizer` and `gguf_tokenizer`.
    """
    path = Path(path)
    if has_tokenizer(path):
        return read_tokenizer(path)
    files = find_model(path)
    if files.kind != "gguf":
        return read_tokenizer(files.directory)
    tensors = open_gguf(files)
    return gguf_tokenizer(tensors.metadata, tensors.where)
