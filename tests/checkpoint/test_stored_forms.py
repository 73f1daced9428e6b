"""The same model in other files: GGUF as llama.cpp converts it, fp8 with scales, MXFP4."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pympa.checkpoint.checkpoint import open_checkpoint
from pympa.errors import RefusedError
from pympa.model.weights import fill_weight, full_weight, model_weights
from pympa.verify import reference
from support.gguf_models import ARCHITECTURES, write_gguf
from support.model_files import PROMPTS, load_family, prompt, rows_of, weights, write_family

F32 = np.dtype(np.float32)


def logits(checkpoint, tokens):
    """Return the oracle's logits of all tokens of a prompt."""
    specs = model_weights(checkpoint.spec)

    def weight(name):
        return full_weight(checkpoint.source, specs[name], F32)

    _, found = reference.forward(checkpoint.spec, weight, [prompt(tokens)], all_logits=True)
    return found


def error(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


# What a GGUF file, or llama.cpp, cannot say of a model.
PLAINER = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 3},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3": {"query_pre_attn_scalar": 24, "layer_types": ["sliding_attention"] * 3},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf(name, tmp_path):
    write_gguf(name, tmp_path / "model.gguf")
    found = open_checkpoint(tmp_path / "model.gguf")
    write_family(name, tmp_path / "plain", **PLAINER.get(name, {}))
    plain = open_checkpoint(tmp_path / "plain")
    for tokens in PROMPTS:
        # Divisors of frequencies and attention factors are float32 in the file.
        assert error(logits(found, tokens), logits(plain, tokens)) < 2e-6
        if name not in PLAINER:
            want = np.array(load_family(name)["logits"][str(tokens)])
            assert error(logits(found, tokens)[rows_of(tokens)], want) < 2e-6


def test_gguf_of_whole_patterns(tmp_path):
    """Gemma 3 with six layers: five windows, then none."""
    from support import gguf_models

    family = load_family("gemma3")
    config = family["config"] | {"num_hidden_layers": 6, "query_pre_attn_scalar": 24}
    config["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"]
    tensors = {n: s for n, s in family["tensors"].items() if ".layers." not in n}
    for name, shape in family["tensors"].items():
        if ".layers.0." in name:
            tensors |= {name.replace(".0.", f".{i}."): shape for i in range(6)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights(tensors), tmp_path / "model.safetensors")
    want = logits(open_checkpoint(tmp_path), 7)
    whole = {"config": config, "tensors": tensors}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_models, "load_family", lambda name: whole)
        write_gguf("gemma3", tmp_path / "model.gguf")
    found = open_checkpoint(tmp_path / "model.gguf")
    assert [layer.window for layer in found.spec.blocks] == [9] * 5 + [None]
    assert error(logits(found, 7), want) < 1e-6


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_quantised_gguf(kind, tmp_path):
    """Widened weights are near the plain ones, as near as the type is fine."""
    write_gguf("qwen3", tmp_path / "model.gguf", kind)
    found = open_checkpoint(tmp_path / "model.gguf")
    want = np.array(load_family("qwen3")["logits"]["7"])
    assert error(logits(found, 7), want) < {"Q8_0": 0.05, "Q4_0": 0.6, "Q5_1": 0.3}[kind]


def test_an_unknown_architecture_is_named(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "qwen3", "mamba")
        write_gguf("qwen3", tmp_path / "model.gguf")
    with pytest.raises(
        RefusedError, match=r"general\.architecture: expected one of llama, .*mamba"
    ):
        open_checkpoint(tmp_path / "model.gguf")


def scaled(array, block):
    """Return fp8 values and their scales by blocks, and the values that they stand for."""
    rows, columns = (-(-size // block) for size in array.shape)
    scales = np.empty((rows, columns), np.float32)
    values = np.empty(array.shape, ml_dtypes.float8_e4m3fn)
    wide = np.empty(array.shape, np.float32)
    for i in range(rows):
        for j in range(columns):
            here = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scales[i, j] = np.abs(array[here]).max() / 448
            values[here] = (array[here] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
            wide[here] = values[here].astype(np.float32) * scales[i, j]
    return values, scales, wide


def test_fp8_with_scales_of_blocks(tmp_path):
    """As DeepSeek-V3 is published."""
    family = load_family("deepseek_v3")
    stored, plain = {}, {}
    for name, array in weights(family["tensors"]).items():
        stored[name] = plain[name] = array
        if "proj" in name and array.ndim == 2:
            stored[name], stored[f"{name}_scale_inv"], plain[name] = scaled(array, 16)
    quantised = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
    found = []
    for kind, arrays, more in (("fp8", stored, {"quantization_config": quantised}),
                               ("plain", plain, {})):  # fmt: skip
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps(family["config"] | more))
        save_file(arrays, tmp_path / kind / "model.safetensors")
        found.append(logits(open_checkpoint(tmp_path / kind), 7))
    np.testing.assert_array_equal(*found)


def test_mxfp4_experts(tmp_path):
    """As gpt-oss is published: experts in MXFP4, `[experts, outputs, inputs]`."""
    family = load_family("gpt_oss")
    stored, plain = {}, {}
    rng = np.random.default_rng(0)
    for name, array in weights(family["tensors"]).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = plain[name] = array
            continue
        experts, inputs, outputs = array.shape
        shape = experts, outputs, inputs // 32
        blocks = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
        scales = rng.integers(122, 127, shape, dtype=np.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        plain[name] = np.ascontiguousarray(widen(blocks, scales).swapaxes(1, 2))
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    found = []
    for kind, arrays, more in (("mxfp4", stored, quantised), ("plain", plain, {})):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps(family["config"] | more))
        save_file(arrays, tmp_path / kind / "model.safetensors")
        found.append(logits(open_checkpoint(tmp_path / kind), 7))
    np.testing.assert_array_equal(*found)


def widen(blocks, scales):
    """MXFP4 by its definition, one value after the other (OCP Microscaling 1.0)."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = [*magnitudes, *(-one for one in magnitudes)]
    out = np.empty((*scales.shape, 32), np.float32)
    for at in np.ndindex(scales.shape):
        for byte, pair in enumerate(blocks[at].tolist()):
            for half, code in enumerate((pair & 15, pair >> 4)):
                out[(*at, 2 * byte + half)] = math.ldexp(values[code], int(scales[at]) - 127)
    return out.reshape(*scales.shape[:-1], -1)


@pytest.mark.parametrize("aligned", [True, False])
def test_what_lies_as_it_is_wanted_is_not_copied(tmp_path, aligned):
    write_family("qwen3", tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    header = data[8:stop].rstrip()
    header += b" " * ((0 if aligned else 1) - len(header) % 8 + 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[stop:])
    checkpoint = open_checkpoint(tmp_path)
    weight = model_weights(checkpoint.spec)["layers.1.mlp.up"]
    whole = weights(load_family("qwen3")["tensors"])["model.layers.1.mlp.up_proj.weight"]
    rows, cols = [(2, 11)], [(1, 8)]

    def read(out, *spans):
        return checkpoint.source.read(weight, out, *spans)

    for out, want, *spans in (
        (np.empty_like(whole), whole),
        (np.empty_like(whole[2:11]), whole[2:11], rows),
        (np.empty((9, 7), np.float32), whole[2:11, 1:8], rows, cols),
    ):
        found = read(out, *spans)
        assert (found is out) == (not aligned)
        np.testing.assert_array_equal(found, want)
    converted = np.empty(whole.shape, np.float16)
    assert read(converted) is converted
    put_together = np.empty((9, whole.shape[1]), np.float32)
    assert read(put_together, [(3, 9), (0, 3)]) is put_together


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes(dtype, tmp_path):
    write_family("qwen3", tmp_path)
    arrays = {n: a.astype(dtype) for n, a in weights(load_family("qwen3")["tensors"]).items()}
    save_file(arrays, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    name, weight = "layers.1.mlp.up", model_weights(checkpoint.spec)["layers.1.mlp.up"]
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16):
        out = np.empty(weight.shape, kind)
        fill_weight(checkpoint.source, weight, out)
        want = arrays["model.layers.1.mlp.up_proj.weight"].astype(np.float64)
        np.testing.assert_array_equal(out, want.astype(kind), err_msg=name)
