"""Equal weights have one fingerprint, however they lie in files; other weights have another."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pympa.checkpoint.fingerprint import fingerprint
from support.opened_files import open_tensors

TENSORS = {name: np.full((9, 40), value, np.float32) for name, value in (("a", 1), ("b", 2))}


def identity(directory, tensors):
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return fingerprint(open_tensors(directory))


def test_shards_are_as_one_file(tmp_path):
    for name, array in TENSORS.items():
        save_file({name: array}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = fingerprint(open_tensors(tmp_path))
    assert found == identity(tmp_path / "one", TENSORS)
    assert len(found) == 16


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "b": TENSORS["b"] * 2},
        {**TENSORS, "b": TENSORS["b"].reshape(40, 9)},
        {**TENSORS, "b": TENSORS["b"].view(np.int32)},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {**TENSORS, "empty": np.empty((0, 3), np.float32)},
    ],
)
def test_other_weights_have_another(tmp_path, other):
    assert identity(tmp_path / "one", TENSORS) != identity(tmp_path / "two", other)
