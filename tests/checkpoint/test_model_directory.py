"""Only files of a model directory are read, whatever its names and links say."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pympa.checkpoint.json_file import parse_json, read_json
from pympa.checkpoint.model_directory import INDEX, find_model, gguf_parts, member
from pympa.checkpoint.safetensors_files import open_safetensors
from pympa.errors import RefusedError


def touch(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_bytes(b"")
    return directory


@pytest.mark.parametrize(
    ("names", "kind", "weights"),
    [
        (["model.safetensors", INDEX], "safetensors", "model.safetensors"),
        (
            [INDEX, "a.safetensors"],
            "index",
            INDEX,
        ),
        (["a.safetensors", "pytorch_model.bin", "b.gguf"], "safetensors", "a.safetensors"),
        (["b.gguf", "pytorch_model.bin"], "gguf", "b.gguf"),
        (["b-00001-of-00002.gguf", "b-00002-of-00002.gguf"], "gguf", "b-00001-of-00002.gguf"),
    ],
)
def test_the_weights_of_a_directory(tmp_path, names, kind, weights):
    found = find_model(touch(tmp_path, *names))
    assert (found.kind, found.weights.name) == (kind, weights)
    assert find_model(tmp_path / weights).kind == kind


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ([], "got none of them"),
        (["a.safetensors", "b.safetensors"], "expected one file of weights"),
        (["a.gguf", "b.gguf"], "name the one to read"),
        (["pytorch_model.bin"], "convert them where you trust them"),
        (["consolidated.00.pth", "consolidated.01.pth"], "which run code"),
    ],
)
def test_a_directory_without_weights_that_can_be_read(tmp_path, names, why):
    with pytest.raises(RefusedError, match=why):
        find_model(touch(tmp_path, *names))


@pytest.mark.parametrize("name", ["no/such", "a.pt", "README.md", "x\0y", "n" * 5000])
def test_a_path_that_is_no_model(tmp_path, name):
    touch(tmp_path, "a.pt", "README.md")
    with pytest.raises(RefusedError) as refused:
        find_model(tmp_path / name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\\b", "a\0"])
def test_a_member_has_a_plain_name(tmp_path, name):
    with pytest.raises(RefusedError, match="plain file name"):
        member(tmp_path, name)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    model = touch(tmp_path / "model")
    save_file({"x": np.ones(3, np.float32)}, tmp_path / "outside.safetensors")
    (model / "model.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(RefusedError, match="got a link to"):
        open_safetensors(model)


def test_a_link_round_in_a_circle_is_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(RefusedError):
        open_safetensors(tmp_path)


def test_links_within_the_directory_and_to_it_are_fine(tmp_path):
    model = touch(tmp_path / "model")
    save_file({"x": np.ones(3, np.float32)}, model / "kept.data")
    (model / "model.safetensors").symlink_to("kept.data")
    (tmp_path / "alias").symlink_to("model")
    assert list(open_safetensors(tmp_path / "alias").stored) == ["x"]


def test_a_snapshot_of_the_cache_of_hugging_face_has_its_own_blobs(tmp_path):
    blobs, snapshot = touch(tmp_path / "m" / "blobs"), touch(tmp_path / "m" / "snapshots" / "abc")
    save_file({"x": np.ones(3, np.float32)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert list(open_safetensors(snapshot).stored) == ["x"]
    assert list(open_safetensors(snapshot / "model.safetensors").stored) == ["x"]
    other = touch(tmp_path / "other" / "snapshots" / "abc")
    (other / "model.safetensors").symlink_to("../../../m/blobs/0123")
    with pytest.raises(RefusedError, match="got a link to"):
        open_safetensors(other)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(RefusedError, match="expected a regular file; got a pipe"):
        open_safetensors(tmp_path)


def test_the_parts_of_a_split_file(tmp_path):
    parts = gguf_parts(tmp_path / "m-00001-of-00003.gguf", 3)
    assert [part.name for part in parts][2] == "m-00003-of-00003.gguf"
    with pytest.raises(RefusedError, match="llama-gguf-split"):
        gguf_parts(tmp_path / "m.gguf", 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "expected JSON"),
        (b"3", "got a number"),
        (b"null", "got null"),
        (b'"x"', "got a text"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' twice"),
        (b'{"a": 680564733841876926926749214863536422912}', "128 bits"),
        (b"[" * 1_000_000, "levels of brackets"),
    ],
)
def test_json_that_is_refused(text, why):
    with pytest.raises(RefusedError, match=why):
        parse_json(text, "config.json")


def test_json_may_have_the_largest_number_of_published_files():
    assert parse_json(b'{"model_max_length": %d}' % int(1e30), "t") == {
        "model_max_length": int(1e30)
    }


def test_json_that_is_too_long(tmp_path):
    (tmp_path / "config.json").write_text(" " * 99)
    with pytest.raises(RefusedError, match="expected at most 98 bytes"):
        read_json(tmp_path / "config.json", 98)
