"""Norms, RoPE, gathered rows and sums: values, strides, threads and NaN."""

import ml_dtypes
import numpy as np
import pytest

from pympa.verify import reference
from support.compare import assert_close, normal, wide


@pytest.fixture
def kernels(all_kernels):
    return all_kernels


def run_norm(kernels, x, weight, bias, kind, threads=1):
    out = np.full(x.shape, np.nan, x.dtype)
    kernels.core.norm(x, weight, bias, 1e-5, kind, out, kernels.on(threads))
    return out


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (40, 129), (0, 16), (5, 4096)])
@pytest.mark.parametrize("biased", [False, True])
def test_norm(kernels, dtype, rng, kind, rows, columns, biased):
    x = normal(rng, (rows, columns), dtype, 3.0)
    weight = normal(rng, columns, dtype)
    bias = normal(rng, columns, dtype) if biased else None
    out = run_norm(kernels, x, weight, bias, kind)
    want = reference.norm(wide(x), wide(weight), wide(bias) if biased else None, 1e-5, kind)
    assert_close(out, want, dtype)
    assert run_norm(kernels, x, weight, bias, kind, 3).tobytes() == out.tobytes()


def test_layer_norm_far_from_zero(kernels, rng):
    # One pass (E[x^2] - E[x]^2) would lose every digit here. Whole numbers, and as many as a power
    # of two, so that the mean has no error of its own, which would be 1000 * 2^-24.
    x = (1000 + rng.integers(-3, 4, (4, 512))).astype(np.float32)
    one, zero = np.ones(512, np.float32), np.zeros(512, np.float32)
    got = run_norm(kernels, x, one, zero, "layer")
    want = reference.norm(wide(x), wide(one), wide(zero), 1e-5, "layer")
    assert_close(got, want, np.float32)


def test_norm_of_a_strided_view(kernels, dtype, rng):
    x = normal(rng, (10, 60), dtype)
    weight = normal(rng, 33, dtype)
    strided = run_norm(kernels, x[1::2, 9:42], weight, None, "rms")
    plain = run_norm(kernels, np.ascontiguousarray(x[1::2, 9:42]), weight, None, "rms")
    assert strided.tobytes() == plain.tobytes()


def test_norm_shows_nan(kernels, dtype, rng):
    x = normal(rng, (3, 40), dtype)
    x[1, 39] = np.nan
    for kind in ("rms", "layer"):
        broken = np.isnan(wide(run_norm(kernels, x, np.ones(40, dtype), None, kind)))
        assert broken[1].all()
        assert not broken[[0, 2]].any()


def test_norm_against_torch(kernels, dtype, rng):
    torch = pytest.importorskip("torch", reason="torch is the second opinion on norms")
    x, weight, bias = (normal(rng, s, dtype) for s in ((9, 70), 70, 70))
    t_x, t_weight, t_bias = (torch.tensor(wide(a)) for a in (x, weight, bias))
    layer = torch.nn.functional.layer_norm(t_x, (70,), t_weight, t_bias, 1e-5)
    assert_close(run_norm(kernels, x, weight, bias, "layer"), layer.numpy(), dtype)
    rms = torch.nn.functional.rms_norm(t_x, (70,), t_weight, 1e-5)
    assert_close(run_norm(kernels, x, weight, None, "rms"), rms.numpy(), dtype)


def tables(half, positions=64):
    angle = np.arange(positions)[:, None] * 100.0 ** (-np.arange(half) / max(half, 1))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize(("head_dim", "half"), [(2, 1), (64, 32), (50, 25), (80, 16), (9, 4)])
def test_rope(kernels, dtype, rng, head_dim, half):
    x = normal(rng, (30, 3, head_dim), dtype)
    index = rng.integers(0, 64, 30).astype(np.int32)
    cos, sin = tables(half)
    c, s = wide(cos)[index][:, None], wide(sin)[index][:, None]
    first, second = wide(x)[..., :half], wide(x)[..., half : 2 * half]
    want = wide(x)
    want[..., :half] = first * c - second * s
    want[..., half : 2 * half] = second * c + first * s
    rotated = x.copy()
    kernels.core.rope(rotated, cos, sin, index, kernels.on(1))
    assert_close(rotated, want, dtype)
    assert rotated[..., 2 * half :].tobytes() == x[..., 2 * half :].tobytes()
    threaded = x.copy()
    kernels.core.rope(threaded, cos, sin, index, kernels.on(3))
    assert threaded.tobytes() == rotated.tobytes()


def test_rope_on_a_slice(kernels, dtype, rng):
    fused = normal(rng, (12, 6, 32), dtype)
    before = fused.copy()
    cos, sin = tables(16)
    index = np.arange(12, dtype=np.int32)
    plain = np.ascontiguousarray(fused[:, 2:5])
    kernels.core.rope(plain, cos, sin, index, kernels.on(1))
    kernels.core.rope(fused[:, 2:5], cos, sin, index, kernels.on(1))
    assert fused[:, 2:5].tobytes() == plain.tobytes()
    assert fused[:, :2].tobytes() == before[:, :2].tobytes()
    assert fused[:, 5:].tobytes() == before[:, 5:].tobytes()


def test_gather_rows(kernels, dtype, rng):
    source = normal(rng, (10, 23), dtype)
    index = np.array([5, 14, 4, 15, 9, 0, -3], np.int32)
    out = np.full((7, 23), np.nan, dtype)
    for threads in (1, 3):
        kernels.core.gather_rows(source, index, out, 5, kernels.on(threads))
        want = np.zeros((7, 23), dtype)
        want[0], want[1], want[4] = source[0], source[9], source[4]
        assert out.tobytes() == want.tobytes()


@pytest.mark.parametrize("columns", [1, 16, 77])
def test_add_rounds_once(kernels, dtype, rng, columns):
    a, b = normal(rng, (13, columns), dtype), normal(rng, (13, columns), dtype)
    want = (a.astype(np.float32) + b.astype(np.float32)).astype(dtype)
    out = np.empty_like(a)
    kernels.core.add(a, b, out, kernels.on(2))
    assert out.tobytes() == want.tobytes()
    kernels.core.add(a, b, a, kernels.on(1))
    assert a.tobytes() == want.tobytes()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_sum_partials_in_order(kernels, dtype, rng, parts, biased):
    x = normal(rng, (parts, 9, 35), dtype)
    bias = normal(rng, 35, dtype) if biased else None
    total = np.zeros((9, 35), np.float32)
    for part in x:
        total += part.astype(np.float32)
    if bias is not None:
        total += bias.astype(np.float32)
    out = np.empty((9, 35), dtype)
    kernels.core.sum_partials(x, bias, out, kernels.on(2))
    assert out.tobytes() == total.astype(dtype).tobytes()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_16_bit_value_survives(kernels, name):
    dtype = np.dtype(np.float16 if name == "float16" else ml_dtypes.bfloat16)
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(256, 256)
    out = np.empty_like(values)
    kernels.core.add(values, np.zeros_like(values), out, kernels.on(1))
    finite = ~np.isnan(values.astype(np.float32))
    assert (np.isnan(out.astype(np.float32)) == ~finite).all()
    assert (out[finite] == values[finite]).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_of_every_exponent(kernels, name, rng):
    """Stores agree with NumPy on random bits: subnormals, ties, overflow, infinity and NaN."""
    dtype = np.dtype(np.float16 if name == "float16" else ml_dtypes.bfloat16)
    bits = rng.integers(0, 1 << 32, (200, 200), np.uint32)
    bits[::2] &= 0xFFFFF000  # makes ties likely
    x = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(dtype)
    # The state of attention is float32, so `finish` with row_sum = 1 shows the rounding alone.
    out = np.empty((200, 1, 200), dtype)
    one = np.ones((200, 1), np.float32)
    kernels.core.finish(one, one, x.reshape(200, 1, 200), out, np.empty_like(one), kernels.on(1))
    nan = np.isnan(x)
    assert (np.isnan(out[:, 0].astype(np.float32)) == nan).all()
    assert (out[:, 0][~nan] == want[~nan]).all()
