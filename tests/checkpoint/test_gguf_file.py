"""GGUF files are read as the gguf package reads them, but none of their counts is trusted."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from pympa.checkpoint.gguf_file import open_gguf
from pympa.errors import RefusedError
from support.opened_files import open_tensors

RANDOM = np.random.default_rng(5)
MATRIX = RANDOM.standard_normal((20, 512)).astype(np.float32)
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
BY_BITS = [
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
]  # any bits are valid


def stored_as(kind: str) -> np.ndarray:
    if kind in BY_BITS:
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        shape = (20, 512 // per_block * block_bytes)
        return RANDOM.integers(0, 60, shape, np.uint8)  # keeps scales finite
    return gguf.quants.quantize(MATRIX, GGMLQuantizationType[kind])


def write(path: Path, kind: str = "F32") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.whole", 7)
    writer.add_float32("a.number", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "naïve")
    writer.add_array("a.texts", ["x", "", "z" * 300])
    writer.add_array("a.numbers", [1, -2, 3])
    stored = stored_as(kind)
    writer.add_tensor("m", stored, raw_dtype=GGMLQuantizationType[kind])
    writer.add_tensor("v", MATRIX[0, :5])
    writer.add_tensor("e", MATRIX.reshape(4, 5, 512))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS + BY_BITS)
def test_any_rows_and_columns_of_each_type(tmp_path, kind):
    tensors = open_gguf(write(tmp_path / "m.gguf", kind))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    (other,) = (one for one in reader.tensors if one.name == "m")
    expected = gguf.quants.dequantize(other.data, other.tensor_type).reshape(20, 512)
    whole = tensors.read("m")
    assert tensors.stored["m"].shape == whole.shape == (20, 512)
    np.testing.assert_array_equal(whole.astype(np.float32), expected)
    part = tensors.read("m", [(3, 5), (9, 10)], [(30, 34), (255, 300)])
    rows, cols = [3, 4, 9], [*range(30, 34), *range(255, 300)]
    np.testing.assert_array_equal(part.astype(np.float32), expected[rows][:, cols])
    assert tensors.read("m", [], [(1, 2)]).shape == (0, 1)
    assert tensors.read("m", [(1, 3)], []).shape == (2, 0)


def test_metadata_and_plain_tensors(tmp_path):
    path = write(tmp_path / "m.gguf")
    tensors = open_gguf(tmp_path)
    values = {key: value for key, value in tensors.metadata.items() if key.startswith("a.")}
    assert values.pop("a.numbers").tolist() == [1, -2, 3]
    assert values == {
        "a.whole": 7, "a.number": 0.5, "a.flag": True, "a.text": "naïve",
        "a.texts": ["x", "", "z" * 300],
    }  # fmt: skip
    assert not tensors.read("e", [(1, 2)]).flags.owndata
    found = open_tensors(path).read("e", [(2, 3)])
    np.testing.assert_array_equal(found[0], MATRIX[10:15])


def test_parts_of_a_split_file_are_one(tmp_path):
    for part in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{part}-of-00002.gguf", "llama")
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"t{part}", MATRIX)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert sorted(open_gguf(tmp_path).stored) == ["t1", "t2"]
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(RefusedError, match="No such file"):
        open_gguf(tmp_path)


def key(name: bytes, kind: GGUFValueType, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def entry(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", kind, offset)


def document(keys: list[bytes], entries: list[bytes], data: int = 64, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(keys))
    head += b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % 32) + bytes(data)


STRING, ARRAY, U8 = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.UINT8
F32, Q4_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0
HUGE = struct.pack("<Q", 1 << 60)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "expected a file to map"),
        (b"GG", "magic number"),
        (b"PK\x03\x04" + bytes(40), "no GGUF file"),
        (document([], [], version=1), "version: expected 2 or 3.*got 1"),
        (document([], [], version=3 << 24), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0), "tensors: expected at most 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62) + bytes(99), "metadata keys: .* at most 7"),
        (document([key(b"k", STRING, HUGE)], []), "bytes of k: expected at most"),
        (document([key(b"k", ARRAY, struct.pack("<I", U8) + HUGE)], []), "k: expected at most"),
        (document([key(b"k", ARRAY, struct.pack("<I", STRING) + HUGE)], []), "k: expected at most"),
        (document([key(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "of arrays"),
        (document([key(b"k", ARRAY, struct.pack("<IQ", 77, 1))], []), "type of GGUF"),
        (document([key(b"k", STRING, struct.pack("<Q", 2) + b"\xff\xff")], []), "UTF-8"),
        (document([key(b"k", U8, b"1"), key(b"k", U8, b"2")], []), "k twice"),
        (document([key(b"general.alignment", U8, b"\0")], []), "alignment: expected 1"),
        (document([], [entry(b"t", [8], F32, 0)] * 2), "expected one of this name"),
        (document([], [entry(b"t", [8], F32, 0), entry(b"u", [8], F32, 0)]), "another tensor"),
        (document([], [entry(b"t", [8], F32, 4)]), "aligned to 32"),
        (document([], [entry(b"t", [17], F32, 0)]), "expected a file of at least"),
        (document([], [entry(b"t", [8], F32, 1 << 62)]), "expected a file of at least"),
        (document([], [entry(b"t", [1 << 40] * 4, F32, 0)]), "expected a file of at least"),
        (document([], [entry(b"t", [1] * 5, F32, 0)]), "at most 4 axes"),
        (document([], [entry(b"t", [8], 99, 0)]), "type of ggml"),
        (document([], [entry(b"t", [33], Q4_0, 0)]), "multiple of 32"),
        (document([], [entry(b"t", [], Q4_0, 0)]), "multiple of 32"),
        (document([], [entry(b"t", [256], GGMLQuantizationType.Q8_K, 0)], 999), "widens; got Q8_K"),
        (document([key(b"split.count", U8, b"\x02")], []), "llama-gguf-split"),
    ],
)
def test_a_broken_header_is_refused(tmp_path, text, why):
    (tmp_path / "m.gguf").write_bytes(text)
    with pytest.raises(RefusedError, match=why) as refused:
        open_gguf(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "m.gguf").read_bytes()
    for length in [*range(0, 700, 3), *range(700, len(whole), 4999)]:
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(RefusedError):
            open_gguf(tmp_path / "m.gguf")
