"""Small model directories, whose weights follow from the names of tensors."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

FOLDER = Path(__file__).parents[1] / "checkpoint" / "families"
PROMPTS = (1, 7, 300)
VOCABULARY = 99


def prompt(tokens: int) -> NDArray[np.int32]:
    """Return the token ids of a prompt."""
    return np.random.default_rng(tokens).integers(0, VOCABULARY, tokens).astype(np.int32)


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the elements of a stored tensor."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = np.asarray(rng.standard_normal(shape, np.float32))
    if name.endswith(("norm.weight", "layer_norm.weight")):
        values = np.float32(1.0) + np.float32(0.3) * values
    elif len(shape) < 2 or name.endswith("_bias"):
        values = np.float32(0.3) * values
    else:
        values = values * np.float32(1.2 / np.sqrt(shape[-1]))
    return np.asarray(values, np.float32)


def weights(tensors: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Return stored tensors by name, given their shapes."""
    return {name: weight(name, tuple(shape)) for name, shape in tensors.items()}


def families() -> list[str]:
    """Return the names of the models with stored logits."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_family(name: str) -> dict[str, Any]:
    """Return a stored model: its config, the shapes of its tensors, and its logits."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def write_family(name: str, directory: Path, **changes: Any) -> dict[str, Any]:
    """Write a model directory; `changes` replace fields of its configuration."""
    family = load_family(name)
    return write_model(directory, family["config"] | changes, family["tensors"]) and family


def write_model(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """Write config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights(tensors), directory / "model.safetensors")
    return directory


def rows_of(tokens: int) -> list[int]:
    """Return the rows of a prompt whose logits are stored."""
    return list(range(tokens)) if tokens < 10 else [0, tokens // 2, tokens - 1]
