"""Whole directories with something broken: one message, or a model that can be read."""

import json
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pympa.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pympa.errors import RefusedError
from pympa.model.shards import Shards
from pympa.model.weights import fill_weight, model_weights
from pympa.plan.mesh import Plan
from pympa.session.resources import build_resources
from pympa.spec import DTYPES
from pympa.transport.endpoint import NullEndpoint
from support import worlds
from support.model_files import load_family, weights, write_family, write_model

EACH = 20  # broken directories of each family


def broken(rng, directory, name):
    """Break one thing in a directory."""
    config, tensors = directory / "config.json", directory / "model.safetensors"
    kind = rng.choice(["cut", "flip", "header", "config", "missing", "shape", "extra", "index"])
    data = bytearray(tensors.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if kind == "cut":
        tensors.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flip":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        tensors.write_bytes(data)
    elif kind == "header":
        header = json.loads(data[8 : 8 + length])
        field = rng.choice([n for n in header if n != "__metadata__"])
        part = rng.choice(["dtype", "shape", "data_offsets"])
        header[field][part] = rng.choice([[], None, "F32", "U8", [1 << 62], [-1, 5], [0, 4], 7])
        text = json.dumps(header).encode()
        tensors.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    elif kind == "config":
        values = json.loads(config.read_text())
        values[rng.choice([*values, "more"])] = rng.choice([None, 3, -1, "x", [], {}, 2.5, True])
        config.write_text(json.dumps(values)[: rng.choice([10, 10**6, 10**6])])
    elif kind == "index":
        shards = {n: rng.choice(["a.safetensors", "../x", "", "b"]) for n in ("m", "n")}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        tensors.unlink()
    else:
        family = load_family(name)
        shapes = dict(family["tensors"])
        some = rng.choice([*shapes])
        if kind == "missing":
            del shapes[some]
        elif kind == "extra":
            shapes[some.replace("weight", "bias") + "2"] = [3]
        else:
            shapes[some] = rng.choice([shapes[some][::-1], [*shapes[some], 1], [1], []])
        write_model(directory, family["config"], shapes)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_moe", "phi3", "gpt_neox", "gpt_oss",
                                  "deepseek_v2", "deepseek_v3", "mixtral", "olmo2"])  # fmt: skip
def test_broken_directories(name, tmp_path):
    rng, refused = random.Random(name), 0
    for number in range(EACH):
        directory = tmp_path / str(number)
        write_family(name, directory)
        broken(rng, directory, name)
        message = ""
        try:
            found = open_checkpoint(directory)
        except RefusedError as error:
            message, refused = str(error), refused + 1
        else:
            assert isinstance(found, Checkpoint)
            resources = build_resources(NullEndpoint(0, 1), Plan(), isa=worlds.ISA)
            Shards(found.spec, resources, DTYPES["float32"], found.source)  # from the map, in C++
            resources.arena.close()
        assert "\n" not in message
        assert len(message) < 2000
        shutil.rmtree(directory)
    assert refused > EACH / 2


MESSAGES = {
    "missing": ("model.layers.1.mlp.up_proj.weight", "expected a tensor .*up_proj.weight"),
    "extra": ("model.layers.0.mlp.extra.weight", "got also model.layers.0.mlp.extra.weight"),
    "a layer too many": ("model.layers.3.mlp.up_proj.weight", "got also model.layers.3.mlp.up"),
    "buffer": ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_tensors_that_are_missing_or_left_over(case, tmp_path):
    name, message = MESSAGES[case]
    family = load_family("qwen3")
    shapes = dict(family["tensors"])
    if case == "missing":
        del shapes[name]
    else:
        shapes[name] = [4, 4]
    write_model(tmp_path, family["config"], shapes)
    if message is None:
        assert open_checkpoint(tmp_path).spec.d_model == 64
        return
    with pytest.raises(RefusedError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_that_is_tied(same, tmp_path):
    family = load_family("gemma2")
    write_model(tmp_path, family["config"], family["tensors"])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if same else 1e-6)
    save_file(tensors, path)
    if same:
        assert open_checkpoint(tmp_path).spec.tied_head
    else:
        with pytest.raises(RefusedError, match="set tie_word_embeddings to false, or remove"):
            open_checkpoint(tmp_path)


def test_a_wrong_shape_is_told_with_the_right_one(tmp_path):
    family = load_family("qwen3")
    shapes = family["tensors"] | {"model.layers.0.self_attn.k_proj.weight": [64, 48]}
    write_model(tmp_path, family["config"], shapes)
    with pytest.raises(RefusedError, match=r"expected the shape \[48, 64\]; got \[64, 48\]"):
        open_checkpoint(tmp_path)


def filled(checkpoint):
    found = {}
    for name, weight in model_weights(checkpoint.spec).items():
        found[name] = np.empty(weight.shape, np.float32)
        fill_weight(checkpoint.source, weight, found[name])
    return found


def test_fused_and_apart_are_the_same(tmp_path):
    """qkv and gate/up in one tensor, and experts in tensors of all."""
    from safetensors.numpy import save_file

    for name, fuse in (("llama", _fused_projections), ("qwen3_moe", _fused_experts)):
        family = load_family(name)
        arrays = weights(family["tensors"])
        write_model(tmp_path / name, family["config"], family["tensors"])
        (tmp_path / f"{name} fused").mkdir()
        (tmp_path / f"{name} fused" / "config.json").write_text(json.dumps(family["config"]))
        save_file(fuse(arrays), tmp_path / f"{name} fused" / "model.safetensors")
        one = filled(open_checkpoint(tmp_path / name))
        other = filled(open_checkpoint(tmp_path / f"{name} fused"))
        for tensor, array in one.items():
            np.testing.assert_array_equal(array, other[tensor], err_msg=tensor)


def _fused_projections(arrays):
    found = dict(arrays)
    for name in arrays:
        for first, others, fused in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("up_proj",), "gate_up_proj"),
        ):
            if f".{first}." in name:
                parts = [name, *(name.replace(first, other) for other in others)]
                joined = np.concatenate([found.pop(part) for part in parts])
                found[name.replace(first, fused)] = joined
    return found


def _fused_experts(arrays):
    found = {n: a for n, a in arrays.items() if ".experts." not in n}
    layers = {n.split(".experts.")[0] for n in arrays if ".experts." in n}
    for layer in layers:
        experts = range(6)

        def of(kind, layer=layer, experts=experts):
            return np.stack([arrays[f"{layer}.experts.{e}.{kind}_proj.weight"] for e in experts])

        both = np.concatenate([of("gate"), of("up")], axis=1)
        found[f"{layer}.experts.gate_up_proj"] = both
        found[f"{layer}.experts.down_proj"] = of("down")
    return found


@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "deepseek_v2", "gpt_oss", "mixtral"])
def test_any_rows_and_columns(name, tmp_path):
    """A part of a tensor is that part of the whole, wherever it is stored."""
    write_family(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    rng = random.Random(name)
    for tensor, weight in model_weights(checkpoint.spec).items():
        whole = np.empty(weight.shape, np.float32)
        fill_weight(checkpoint.source, weight, whole)
        for _ in range(4):
            rows = spans(rng, weight.shape[0])
            cols = spans(rng, weight.shape[1]) if len(weight.shape) == 2 else None
            want = np.concatenate([whole[a:b] for a, b in rows]) if rows else whole[:0]
            if cols is not None:
                want = np.concatenate([want[:, a:b] for a, b in cols], 1) if cols else want[:, :0]
            out = np.empty(want.shape, np.float32)
            fill_weight(checkpoint.source, weight, out, rows, cols)
            np.testing.assert_array_equal(out, want, err_msg=tensor)


def spans(rng, size):
    cuts = sorted(rng.randint(0, size) for _ in range(2 * rng.randint(0, 3)))
    return [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if a < b]
