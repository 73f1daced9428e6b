"""One door to the weights of a model, whatever the format of its files."""

from __future__ import annotations

from pathlib import Path

from pympa.checkpoint.gguf_file import open_gguf
from pympa.checkpoint.model_directory import find_model
from pympa.checkpoint.safetensors_files import open_safetensors
from pympa.checkpoint.tensors import Tensors


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
