"""Quantised weights are widened to the values that other packages give them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pympa.checkpoint.safetensors_files import open_safetensors
from pympa.checkpoint.widened import widened
from pympa.checkpoint.widening import widen_mxfp4, widen_scaled
from pympa.errors import RefusedError

RANDOM = np.random.default_rng(11)
E4M3 = ml_dtypes.float8_e4m3fn
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
FLOAT_QUANTIZED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
SPANS = [
    (None, None),
    ([(3, 140)], [(100, 131)]),
    ([(0, 1), (127, 129), (250, 300)], [(5, 6), (31, 64), (127, 260)]),
    ([(250, 300), (0, 1)], [(128, 200), (3, 4), (4, 70)]),
    ([], [(0, 7)]),
    ([(2, 5)], []),
]


def picked(array, rows, cols):
    for axis, spans in ((-2, rows), (-1, cols)):
        if spans is not None:
            at = [np.arange(*span) for span in spans] or [np.arange(0)]
            array = np.take(array, np.concatenate(at), axis)
    return array


def fp8(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) * 40).astype(E4M3)


def positive(*shape: int) -> np.ndarray:
    return RANDOM.uniform(0.5, 2, shape).astype(np.float32)


def mxfp4(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = RANDOM.integers(0, 256, (*shape, 16), np.uint8)
    return blocks, RANDOM.integers(100, 150, shape, np.uint8)


@pytest.mark.parametrize(("rows", "cols"), SPANS)
def test_fp8_with_a_scale_for_each_block(rows, cols):
    values, scales = fp8(300, 260), positive(3, 3)
    each = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:300, :260]
    expected = picked(values.astype(np.float32) * each, rows, cols)
    np.testing.assert_array_equal(widen_scaled(values, scales, (128, 128), rows, cols), expected)


@pytest.mark.parametrize(("rows", "cols"), SPANS)
@pytest.mark.parametrize("shape", [(1, 1), (300, 1), (1, 260)])
def test_fp8_with_a_scale_for_each_row_or_all(rows, cols, shape):
    values, scales = fp8(300, 260), positive(*shape)
    blocks = tuple(n if count == 1 else 1 for count, n in zip(shape, values.shape, strict=True))
    expected = picked(values.astype(np.float32) * scales, rows, cols)
    np.testing.assert_array_equal(widen_scaled(values, scales, blocks, rows, cols), expected)


def test_fp8_blocks_are_as_transformers_has_them():
    torch = pytest.importorskip("torch", reason="torch is the second opinion")
    module = pytest.importorskip(
        "transformers.integrations.finegrained_fp8", reason="transformers is the second opinion"
    )
    values, scales = fp8(256, 384), positive(2, 3)
    stored = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
    other = module.Fp8Dequantize(None)._dequantize_one(stored, torch.from_numpy(scales))
    np.testing.assert_array_equal(widen_scaled(values, scales, (128, 128)), other.numpy())


@pytest.mark.parametrize(("rows", "cols"), SPANS)
def test_mxfp4_of_any_rows_and_columns(rows, cols):
    blocks, scales = mxfp4(2, 300, 9)
    expected = picked(widen_mxfp4(blocks, scales), rows, cols)
    np.testing.assert_array_equal(widen_mxfp4(blocks, scales, None, rows, cols), expected)
    np.testing.assert_array_equal(widen_mxfp4(blocks, scales, [(1, 2)], rows, cols), expected[1:])


def test_mxfp4_of_one_group_by_hand():
    blocks = np.full((1, 1, 16), 0xF1, np.uint8)  # 1 = 0.5 comes first, then 0xF = -6
    widen = widen_mxfp4(blocks, np.full((1, 1), 128, np.uint8))
    np.testing.assert_array_equal(widen, np.tile(np.float32([1, -12]), 16)[None])
    assert np.isnan(widen_mxfp4(blocks, np.full((1, 1), 255, np.uint8))).all()
    assert widen_mxfp4(blocks, np.zeros((1, 1), np.uint8))[0, 0] == 2.0**-128


def test_mxfp4_is_as_transformers_has_it():
    torch = pytest.importorskip("torch", reason="torch is the second opinion")
    module = pytest.importorskip(
        "transformers.integrations.mxfp4", reason="transformers is the second opinion"
    )
    blocks, scales = mxfp4(3, 20, 4)
    other = module.convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(widen_mxfp4(blocks, scales).swapaxes(1, 2), other.numpy())


def test_mxfp4_is_as_gguf_has_it():
    quants = pytest.importorskip("gguf", reason="gguf is the second opinion").quants
    kind = pytest.importorskip("gguf").GGMLQuantizationType.MXFP4
    stored = quants.quantize(RANDOM.standard_normal((6, 96)).astype(np.float32), kind)
    groups = stored.reshape(6, 3, 17)  # the exponent, then 16 bytes with value i and value i + 16
    nibbles = np.concatenate([groups[..., 1:] & 15, groups[..., 1:] >> 4], -1)
    blocks = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    np.testing.assert_array_equal(
        widen_mxfp4(blocks, groups[..., 0]), quants.dequantize(stored, kind)
    )


def opened(directory, tensors, quantization):
    save_file(tensors, directory / "model.safetensors")
    return widened(open_safetensors(directory), quantization)


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_a_checkpoint_of_fp8_blocks_is_seen_plain(tmp_path, scale_dtype):
    values, scales = fp8(300, 260), positive(3, 3).astype(scale_dtype)
    tensors = opened(
        tmp_path, {"w": values, "w_scale_inv": scales, "norm": np.ones(4, np.float32)}, FP8
    )
    assert sorted(tensors.stored) == ["norm", "w"]
    assert tensors.stored["w"].shape == (300, 260)
    expected = widen_scaled(values, scales, (128, 128))
    np.testing.assert_array_equal(tensors.read("w", [(1, 200)]), expected[1:200])
    assert not tensors.read("norm").flags.owndata


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (30,), (30, 1)])
@pytest.mark.parametrize("method", ["compressed-tensors", "fbgemm_fp8", "fp8"])
def test_a_checkpoint_of_fp8_rows_is_seen_plain(tmp_path, shape, method):
    values, scales = fp8(30, 26), np.asarray(positive(*shape))
    quantization = FLOAT_QUANTIZED if method == "compressed-tensors" else {"quant_method": method}
    tensors = opened(tmp_path, {"w": values, "w_scale": scales}, quantization)
    factor = scales.reshape(-1, 1) if scales.size > 1 else scales
    expected = values.astype(np.float32) * factor
    np.testing.assert_array_equal(tensors.read("w", None, [(3, 20)]), expected[:, 3:20])


def test_a_checkpoint_of_compressed_blocks_is_seen_plain(tmp_path):
    weights = {"weights": {"block_structure": [16, 8]}}
    quantization = {**FLOAT_QUANTIZED, "config_groups": {"group_0": weights}}
    values, scales = fp8(30, 26), positive(2, 4)
    tensors = opened(tmp_path, {"w": values, "w_scale": scales}, quantization)
    np.testing.assert_array_equal(tensors.read("w"), widen_scaled(values, scales, (16, 8)))


def test_a_checkpoint_of_mxfp4_is_seen_plain(tmp_path):
    blocks, scales = mxfp4(4, 6, 3)
    tensors = opened(
        tmp_path, {"x_blocks": blocks, "x_scales": scales, "x_bias": positive(4, 6)},
        {"quant_method": "mxfp4"},
    )  # fmt: skip
    assert sorted(tensors.stored) == ["x", "x_bias"]
    assert (tensors.stored["x"].dtype, tensors.stored["x"].shape) == ("MXFP4", (4, 6, 96))
    found = tensors.read("x", [(2, 3)], None, [(10, 50)])
    np.testing.assert_array_equal(found[0], widen_mxfp4(blocks, scales)[2, :, 10:50])


@pytest.mark.parametrize(
    ("quantization", "tensors", "why"),
    [
        ({"quant_method": "gptq"}, {}, "quant_method: expected .*; got 'gptq'"),
        ({"quant_method": []}, {}, "quant_method"),
        (["fp8"], {}, "quant_method"),
        ({**FLOAT_QUANTIZED, "format": "pack-quantized"}, {}, "format: expected float-quantized"),
        ({**FP8, "weight_block_size": [0, 128]}, {}, "weight_block_size: expected two sizes"),
        ({**FP8, "weight_block_size": 128}, {}, "weight_block_size: expected two sizes"),
        (FP8, {"w": fp8(3, 4)}, "expected a tensor w_scale_inv"),
        (FP8, {"w": fp8(300, 4), "w_scale_inv": positive(2, 1)}, "got the shape"),
        (FP8, {"w": fp8(3, 4), "w_scale_inv": positive(1, 1, 1)}, "got the shape"),
        (FP8, {"w": fp8(3, 4), "w_scale_inv": np.ones((1, 1), np.int8)}, "expected the dtype"),
        (None, {"w": fp8(3, 4)}, "expected a quantization_config"),
        ({"quant_method": "mxfp4"}, {"x_blocks": mxfp4(2, 3)[0]}, "expected a tensor x_scales"),
        (
            {"quant_method": "mxfp4"},
            {"x_blocks": mxfp4(2, 3)[0], "x_scales": mxfp4(2, 4)[1]},
            "expected the shape",
        ),
    ],
)
def test_what_cannot_be_widened_is_refused(tmp_path, quantization, tensors, why):
    with pytest.raises(RefusedError, match=why):
        opened(tmp_path, {"other": np.ones(3, np.float32), **tensors}, quantization)
