"""Gathered rows, sums and caps: values, strides, threads and NaN."""

import ml_dtypes
import numpy as np
import pytest

from support.compare import assert_each_close, assert_same_bits, normal, wide


@pytest.fixture
def kernels(all_kernels):
    return all_kernels


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


@pytest.mark.parametrize("cap", [1e-3, 30.0, 50.0, 1e5])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (0, 8), (3, 0), (5, 4097)])
def test_softcap(kernels, rng, cap, rows, columns):
    memory = normal(rng, (rows, columns + 3), np.float32) * np.float32(cap)
    x, before = memory[:, 2 : 2 + columns], memory.copy()
    x[:, ::3] *= 1e-3
    x[:, ::5] *= 20
    want = cap * np.tanh(wide(x) / cap)
    threaded = x.copy()
    kernels.core.softcap(x, cap, kernels.on(1))
    assert_each_close(x, want, np.float32)
    kernels.core.softcap(threaded, cap, kernels.on(3))
    assert_same_bits(threaded, x.copy())
    assert_same_bits(memory[:, [0, 1, -1]], before[:, [0, 1, -1]])


def test_softcap_of_any_size(kernels):
    """Each element by itself: where the two formulas of tanh meet, and at the ends of float32."""
    sizes = [0.0, 1e-30, 0.62, 0.6249, 0.625, 0.6251, 0.63, 1.0, 8.5, 9.1, 88.0, 3e38, np.inf]
    x = np.array([[s, -s] for s in sizes], np.float32)
    want = 2 * np.tanh(wide(x) / 2)
    kernels.core.softcap(x, 2.0, kernels.on(1))
    assert_each_close(x, want, np.float32)
    broken = np.array([[1.0, np.nan, 1.0]], np.float32)
    kernels.core.softcap(broken, 2.0, kernels.on(1))
    assert np.isnan(broken).tolist() == [[False, True, False]]


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
