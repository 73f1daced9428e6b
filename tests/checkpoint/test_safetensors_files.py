"""Weights in safetensors files are read in place, and nothing broken or hostile is read at all."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pympa.checkpoint.safetensors_files import open_safetensors
from pympa.checkpoint.tensors import find_tensor, select
from pympa.errors import RefusedError

RANDOM = np.random.default_rng(7)
MATRIX = RANDOM.standard_normal((37, 24)).astype(np.float32)


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def shards(directory: Path, index: dict[str, Any] | None = None) -> Path:
    save_file({"a": MATRIX, "b": MATRIX[:3]}, directory / "one.safetensors")
    save_file({"c": MATRIX[3:]}, directory / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    text = json.dumps({"weight_map": weight_map} if index is None else index)
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


def refusal(path: Path) -> str:
    with pytest.raises(RefusedError) as refused:
        open_safetensors(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8",
     "int16", "int32", "int64", "bool"],
)  # fmt: skip
def test_each_dtype_is_read_as_it_was_written(tmp_path, dtype):
    written = (MATRIX * 3).astype(getattr(ml_dtypes, dtype, dtype))
    save_file({"odd": np.ones(3, np.int8), "x": written}, tmp_path / "model.safetensors")
    read = open_safetensors(tmp_path).read("x")
    assert read.dtype == written.dtype
    np.testing.assert_array_equal(read.view(np.uint8), written.view(np.uint8))


def test_a_read_of_one_span_an_axis_is_a_view_that_nobody_can_write(tmp_path):
    save_file({"x": MATRIX}, tmp_path / "model.safetensors")
    part = open_safetensors(tmp_path).read("x", [(3, 9)], [(8, 16)])
    assert not part.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        part[0, 0] = 1
    np.testing.assert_array_equal(part, MATRIX[3:9, 8:16])


@pytest.mark.parametrize("rows", [None, [], [(0, 37)], [(2, 5), (30, 37), (5, 6)], [(4, 4)]])
@pytest.mark.parametrize("cols", [None, [], [(1, 24)], [(0, 3), (7, 24)]])
def test_spans_of_rows_and_columns(tmp_path, rows, cols):
    save_file({"x": MATRIX[None]}, tmp_path / "model.safetensors")
    tensors = open_safetensors(tmp_path)
    expected = MATRIX[np.concatenate([np.arange(*span) for span in rows or [(0, 0)]])]
    expected = MATRIX if rows is None else expected
    if cols is not None:
        expected = expected[:, np.concatenate([np.arange(*span) for span in cols or [(0, 0)]])]
    np.testing.assert_array_equal(tensors.read("x", None, rows, cols)[0], expected)
    found = tensors.read("x", [(0, 1)], rows, cols)
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize("spans", [[[(3, 2)]], [[(0, 38)]], [[(-1, 1)]], [None] * 3])
def test_spans_must_lie_within_a_tensor(spans):
    with pytest.raises(ValueError, match="spans: "):
        select(MATRIX, spans)


def test_shards_with_an_index(tmp_path):
    tensors = open_safetensors(shards(tmp_path))
    assert sorted(tensors.stored) == ["a", "b", "c"]
    np.testing.assert_array_equal(np.concatenate([tensors.read("b"), tensors.read("c")]), MATRIX)


def test_a_tensor_may_be_asked_for_by_name_and_shape(tmp_path):
    save_file({"model.norm.weight": MATRIX[0]}, tmp_path / "any.safetensors")
    tensors = open_safetensors(tmp_path / "any.safetensors")
    assert find_tensor(tensors, "model.norm.weight", (24,)).dtype == "F32"
    with pytest.raises(RefusedError, match=r"expected the shape \[25\]; got \[24\]"):
        find_tensor(tensors, "model.norm.weight", (25,))
    with pytest.raises(RefusedError, match=r"the nearest is model\.norm\.weight"):
        find_tensor(tensors, "norm.weight")


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"x": entry("F32", [2], 0, 8)}, b"1234567", "cut short"),
        ({"x": entry("F32", [2], 0, 8)}, b"123456789", "expected .* bytes, as the header says"),
        ({"x": entry("F32", [3], 0, 8)}, b"12345678", "expected 12 bytes for F32"),
        ({"x": entry("F33", [2], 0, 8)}, b"12345678", "dtype: expected one of .*; got F33"),
        ({"x": entry("F4", [4], 0, 2)}, b"12", "dtype"),
        ({"x": entry("F32", [-2], 0, 8)}, b"12345678", "shape"),
        ({"x": entry("F32", [1] * 99, 0, 4)}, b"1234", "shape"),
        ({"x": entry("F32", [2], 8, 0)}, b"12345678", "data_offsets"),
        ({"x": entry("F32", [2], 0, 1 << 50)}, b"12345678", "data_offsets"),
        ({"x": entry("U8", [1 << 62], 0, 1 << 62)}, b"12345678", "cut short"),
        ({"x": entry("F32", [True, 2], 0, 8)}, b"12345678", "shape"),
        ({"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 4, 12)}, b"1" * 12, "offset"),
        ({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 8, 12)}, b"1" * 12, "offset"),
        ({"x": 3}, b"", "expected an object"),
        (b"[1, 2]", b"", "expected a JSON object"),
        (b"{", b"", "expected JSON"),
        (b'{"x": ' * 100_000, b"", "levels of brackets"),
        (b'{"x": ' * 80 + b"1" + b"}" * 80, b"", "levels of brackets"),
        (b'{"x": ' + b"9" * 5000 + b"}", b"", "5,000 digits"),
        (b'{"x": 1, "x": 2}', b"", "the name 'x' twice"),
        (b'{"\xff": 1}', b"", "expected JSON"),
        ({"__metadata__": {"format": 7}}, b"", "expected a valid safetensors file"),
    ],
)
def test_a_broken_header_is_refused(tmp_path, header, data, why):
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(RefusedError, match=why):
        open_safetensors(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "a file of 0 bytes"),
        (b"1234567", "a file of 7 bytes"),
        (struct.pack("<Q", 1 << 63), "a header of 9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 90_000_000), "expected a header of 90,000,000 bytes; got 0"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, text, why):
    (tmp_path / "model.safetensors").write_bytes(text)
    assert why in refusal(tmp_path)


def test_a_file_cut_after_it_was_opened_is_refused_not_read(tmp_path):
    save_file({"x": MATRIX}, tmp_path / "model.safetensors")
    tensors = open_safetensors(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(RefusedError, match="as when it was opened; got 200"):
        tensors.read("x")


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"a": 3}}, "weight_map"),
        ({"weight_map": {"d": "one.safetensors"}}, "expected tensor d in one.safetensors"),
        ({"weight_map": {"a": "three.safetensors"}}, "1 are missing, the first is three"),
        ({"weight_map": {"a": "../one.safetensors"}}, "plain file name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "plain file name"),
        ({"weight_map": {"a": ".."}}, "plain file name"),
        ({"weight_map": {"a": "x\0y"}}, "plain file name"),
        ({"weight_map": {"a": "\ud800"}}, ""),
        ({"weight_map": {"a": "n" * 5000}}, "are missing"),
    ],
)
def test_an_index_that_leads_astray_is_refused(tmp_path, index, why):
    assert why in refusal(shards(tmp_path, index))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    weight_map = {"a": "one.safetensors", "c": "two.safetensors"}
    shards(tmp_path, {"weight_map": weight_map})
    save_file({"a": MATRIX, "c": MATRIX}, tmp_path / "two.safetensors")
    assert "expected one file with it; got one.safetensors and two.safetensors" in refusal(tmp_path)
