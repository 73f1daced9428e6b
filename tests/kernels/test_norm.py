"""Norms and sums of squares: values, strides, threads, parts of rows and NaN."""

import numpy as np
import pytest

from pympa.verify import reference
from support.compare import HALVES, assert_close, assert_each_close, assert_same_bits, normal, wide


@pytest.fixture
def kernels(all_kernels):
    return all_kernels


def run_norm(kernels, x, weight, bias, kind, *, threads=1, offset=0.0, squares=None, width=0):
    out = np.full(x.shape, np.nan, x.dtype)
    kernels.core.norm(x, weight, bias, 1e-5, kind, offset, squares, width, out, kernels.on(threads))
    return out


def run_squares(kernels, x, threads=1):
    out = np.full((len(x), 1), np.nan, np.float32)
    kernels.core.sum_squares(x, out, kernels.on(threads))
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
    assert run_norm(kernels, x, weight, bias, kind, threads=3).tobytes() == out.tobytes()


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


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("offset", [1.0, -0.25])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (40, 129), (0, 16), (5, 4096)])
def test_gains_with_an_offset(kernels, dtype, rng, kind, offset, rows, columns):
    x, weight, bias = (normal(rng, s, dtype) for s in ((rows, columns), columns, columns))
    out = run_norm(kernels, x, weight, bias, kind, offset=offset)
    assert_close(out, reference.norm(wide(x), wide(weight) + offset, wide(bias), 1e-5, kind), dtype)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("half", HALVES)
def test_an_offset_is_added_in_float32(kernels, rng, half, kind):
    """A gain that was rounded to 16 bits first would round every other element otherwise."""
    x, weight = normal(rng, (40, 300), half), normal(rng, 300, half, 1e-2)
    out = run_norm(kernels, x, weight, None, kind, offset=1.0)
    want = reference.norm(wide(x), wide(weight) + 1, None, 1e-5, kind).astype(half)
    assert (out == want).mean() > 0.99


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (40, 129), (0, 16), (4, 0), (5, 9999)]
)
def test_sum_squares(kernels, dtype, rng, rows, columns):
    x = normal(rng, (rows, columns + 5), dtype, 3.0)[:, 4 : 4 + columns]
    squares = run_squares(kernels, x)
    assert_each_close(squares, (wide(x) ** 2).sum(axis=1, keepdims=True), np.float32)
    assert_same_bits(run_squares(kernels, x, 3), squares)
    assert_same_bits(run_squares(kernels, np.ascontiguousarray(x)), squares)
    for row in range(min(rows, 3)):
        assert_same_bits(run_squares(kernels, x[row : row + 1]), squares[row : row + 1])
    memory = np.zeros((rows, 3), np.float32)
    kernels.core.sum_squares(x, memory[:, 1:2], kernels.on(1))
    assert_same_bits(memory[:, 1:2].copy(), squares)
    assert not memory[:, [0, 2]].any()


@pytest.mark.parametrize("columns", [1, 129, 4096, 6001])
def test_squares_of_whole_rows_change_no_bits(kernels, dtype, rng, columns):
    x, weight = normal(rng, (6, columns), dtype), normal(rng, columns, dtype)
    squares = run_squares(kernels, x)
    given = run_norm(kernels, x, weight, None, "rms", squares=squares, width=columns)
    assert_same_bits(given, run_norm(kernels, x, weight, None, "rms"))


def test_parts_of_rows(kernels, dtype, rng):
    """As ranks normalise what they have of a row, from sums over all of it."""
    x, weight = normal(rng, (11, 300), dtype), normal(rng, 300, dtype)
    parts = [slice(0, 7), slice(7, 200), slice(200, 200), slice(200, 300)]
    memory = np.zeros((11, 2), np.float32)
    memory[:, 1:] = sum(run_squares(kernels, x[:, part]) for part in parts)
    want = reference.norm(wide(x), wide(weight) + 1, None, 1e-5, "rms")
    for part in parts:
        options = {"offset": 1.0, "squares": memory[:, 1:], "width": 300}
        out = run_norm(kernels, x[:, part], weight[part], None, "rms", **options)
        assert_close(out, want[:, part], dtype)
        threaded = run_norm(kernels, x[:, part], weight[part], None, "rms", threads=3, **options)
        assert_same_bits(threaded, out)


def test_squares_show_nan(kernels, dtype, rng):
    x = normal(rng, (3, 40), dtype)
    x[1, 39] = np.nan
    squares = run_squares(kernels, x)
    assert np.isnan(squares).ravel().tolist() == [False, True, False]
    other = run_norm(
        kernels,
        normal(rng, (3, 8), dtype),
        np.ones(8, dtype),
        None,
        "rms",
        squares=squares,
        width=48,
    )
    assert np.isnan(wide(other)).all(axis=1).tolist() == [False, True, False]
