"""Good files, broken at random: either all is read as it was written, or one line refuses them.

A change that leaves a file valid, such as another name for a tensor, may give other data of the
declared size; what never happens is another exception.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pympa.checkpoint.gguf_splits import SPLITS
from pympa.checkpoint.tensors import Tensors
from pympa.checkpoint.widened import widened
from pympa.errors import RefusedError
from support.opened_files import load_tokenizer, open_tensors
from support.vocabularies import byte_level, metadata, sentencepiece, write_directory

RANDOM = np.random.default_rng(3)
MATRIX = RANDOM.standard_normal((6, 64)).astype(np.float32)
BROKEN_TIMES = 150
NUMBERS = [0, 1, 2, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
VALUES = [None, True, -1, 0, 3.5, 1 << 62, 1 << 80, "", "x", "..", "\ud800", [], {}, [[]], [0, 8]]
TEXTS = [
    b"null",
    b"[]",
    b'"',
    b"9" * 5000,
    b"[" * 4000,
    b'{"a":' * 4000,
    b"\xff",
    b"\0",
    b",",
    b"-",
]


def cut(dice: random.Random, data: bytearray) -> None:
    """Cut a file short, or let it go on."""
    if dice.random() < 0.8:
        del data[dice.randrange(len(data)) :]
    else:
        data += dice.randbytes(dice.randrange(1, 100))


def flip(dice: random.Random, data: bytearray) -> None:
    """Change some bits, mostly near the start, where headers are."""
    for _ in range(dice.randrange(1, 5)):
        end = dice.choice([16, 200, len(data)])
        data[dice.randrange(min(end, len(data)))] ^= 1 << dice.randrange(8)


def put_number(dice: random.Random, data: bytearray) -> None:
    """Write an extreme number over eight bytes."""
    at = dice.randrange(max(1, len(data) - 8))
    data[at : at + 8] = struct.pack("<Q", dice.choice(NUMBERS))


def put_text(dice: random.Random, data: bytearray) -> None:
    """Write text that is hard on parsers into a file, or over a part of it."""
    at = dice.randrange(len(data))
    data[at : at + dice.choice([0, 0, 1, 20])] = dice.choice(TEXTS)


def edited(dice: random.Random, value: Any) -> Any:
    """Return JSON with a value changed, a name removed, or one renamed, at any depth."""
    inner: list[Any] = []
    if isinstance(value, (dict, list)):
        inner = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not inner or dice.random() < 0.2:
        return dice.choice(VALUES)
    at = dice.choice(inner)
    value = value.copy()
    if isinstance(value, dict) and dice.random() < 0.3:
        moved = value.pop(at)
        if dice.random() < 0.5:
            value[dice.choice(["x", "", "w", "model.norm.weight"])] = moved
    else:
        value[at] = edited(dice, value[at])
    return value


def edit_json(dice: random.Random, data: bytearray) -> None:
    data[:] = json.dumps(edited(dice, json.loads(data))).encode()


def edit_header(dice: random.Random, data: bytearray) -> None:
    (length,) = struct.unpack_from("<Q", data)
    text = json.dumps(edited(dice, json.loads(data[8 : 8 + length]))).encode()
    data[: 8 + length] = struct.pack("<Q", len(text)) + text


def read_all(tensors: Tensors) -> dict[str, np.ndarray]:
    """Return every tensor, after a check that it has the shape that is listed."""
    found = {name: tensors.read(name) for name in tensors.stored}
    assert all(array.shape == tensors.stored[name].shape for name, array in found.items())
    return found


def breaks(
    target: Path, ways: list[Callable[[random.Random, bytearray], None]], seed: int,
    use: Callable[[], object],
) -> object | None:  # fmt: skip
    """Break a file, use it, and mend it; return what came of it, or None if it was refused."""
    good, dice = target.read_bytes(), random.Random(seed)
    data = bytearray(good)
    for way in dice.sample(ways, dice.choice([1, 1, 1, 2]) if len(ways) > 1 else 1):
        if data:
            way(dice, data)
    target.write_bytes(data)
    try:
        return use()
    except RefusedError as refused:
        message = str(refused)
    finally:
        target.write_bytes(good)
    assert "\n" not in message
    assert len(message) < 5000
    return None


SEEDS = given(st.integers(0, 1 << 32))
OFTEN = settings(max_examples=BROKEN_TIMES, deadline=None)


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    tensors = {"model.norm.weight": MATRIX, "h": MATRIX[0].astype("f2"), "b": np.ones(3, "i1")}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    save_file({"w_blocks": np.ones((2, 3, 4, 16), np.uint8)}, directory / "1.safetensors")
    save_file({"w_scales": np.ones((2, 3, 4), np.uint8), "x": MATRIX}, directory / "2.safetensors")
    files = {"w_blocks": "1.safetensors", "w_scales": "2.safetensors", "x": "2.safetensors"}
    index = {"metadata": {"total_size": 3}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata(sentencepiece(), "llama").items():
        add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool,
               int: writer.add_uint32}  # fmt: skip
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        add[type(plain)](key, plain)
    for kind in ("Q4_0", "Q8_0", "BF16"):
        number = GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quants.quantize(MATRIX, number), raw_dtype=number)
    writer.add_tensor("f", MATRIX)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    made = byte_level([*SPLITS["gpt-2"].expressions])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{{ eos_token }}"
    directory = write_directory(tmp_path_factory.mktemp("t"), made, chat_template=template)
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": 3}')
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    return directory


@SEEDS
@OFTEN
def test_a_cut_file_is_never_read(one_file, seed):
    target = one_file / "model.safetensors"
    assert breaks(target, [cut], seed, lambda: read_all(open_tensors(one_file))) is None


@SEEDS
@OFTEN
def test_a_broken_safetensors_file(one_file, seed):
    ways = [cut, flip, put_number, put_text, edit_header]
    breaks(one_file / "model.safetensors", ways[-1:] if seed % 2 else ways[:-1], seed,
           lambda: read_all(open_tensors(one_file)))  # fmt: skip


@SEEDS
@OFTEN
def test_a_broken_index_gives_the_data_or_nothing(shards, seed):
    ways = [cut, flip, put_text, edit_json]
    found = breaks(shards / "model.safetensors.index.json", ways[-1:] if seed % 2 else ways[:-1],
                   seed, lambda: read_all(open_tensors(shards)))  # fmt: skip
    if found is not None and "x" in found:
        np.testing.assert_array_equal(found["x"], MATRIX)


@SEEDS
@OFTEN
def test_broken_shards_of_mxfp4(shards, seed):
    def use() -> object:
        return read_all(widened(open_tensors(shards), {"quant_method": "mxfp4"}))

    breaks(shards / f"{1 + seed % 2}.safetensors", [edit_header], seed, use)


@SEEDS
@OFTEN
def test_a_broken_gguf_file(gguf_file, seed):
    def use() -> object:
        found = read_all(open_tensors(gguf_file))
        load_tokenizer(gguf_file).encode("The ring")
        return found

    breaks(gguf_file, [cut, flip, put_number, put_text], seed, use)


@SEEDS
@OFTEN
def test_a_broken_tokenizer(tokenizer_directory, seed):
    name, ways = random.Random(seed).choice(
        [
            ("tokenizer.json", [cut, flip, put_text, edit_json]),
            ("tokenizer_config.json", [cut, flip, put_text, edit_json]),
            ("generation_config.json", [edit_json]),
            ("special_tokens_map.json", [edit_json]),
        ]
    )

    def use() -> object:
        tokenizer = load_tokenizer(tokenizer_directory)
        text = tokenizer.chat([{"role": "user", "content": "The ring"}])
        return tokenizer.decode(tokenizer.encode(text))

    breaks(tokenizer_directory / name, ways[-1:] if seed % 2 else ways, seed, use)
