"""Kernels that work on rows one by one, and copies, on a GPU."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from on_device import ALL_DTYPES, assert_close, assert_same_bits, normal, wide
from pympa import reference

examples = settings.get_profile("devices")
dtypes = st.sampled_from(ALL_DTYPES)


def sizes(bench):
    """Draw rows and columns, neither of them round."""
    columns = st.sampled_from([1, 7, 8, 16, 33]) | st.integers(1, bench.most(6000, 90))
    return st.tuples(st.integers(0, bench.most(300, 12)), columns)


@examples
@given(data=st.data(), dtype=dtypes, kind=st.sampled_from(["rms", "layer"]), biased=st.booleans())
def test_norms_match_the_formula_row_by_row(bench, data, dtype, kind, biased):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    (rows, columns), shift = data.draw(sizes(bench)), data.draw(st.integers(0, 5))
    x = normal(rng, (rows, columns + shift), dtype, 3.0)
    weight, bias = normal(rng, (columns,), dtype), normal(rng, (columns,), dtype)

    with bench.scope():
        device_x, device_weight = bench.put(x)[:, shift:], bench.put(weight)
        device_bias = bench.put(bias) if biased else None

        def run(part):
            out = bench.empty((len(range(rows)[part]), columns), dtype)
            bench.kernels.norm(device_x[part], device_weight, device_bias, out, eps=1e-5, kind=kind)
            return bench.get(out)

        got = run(slice(None))
        assert_same_bits(run(slice(rows // 3, None)), got[rows // 3 :])
    wide_bias = wide(bias) if biased else None
    assert_close(
        got, reference.norm(wide(x[:, shift:]), wide(weight), wide_bias, 1e-5, kind), dtype
    )


@examples
@given(data=st.data(), dtype=dtypes)
def test_rope_matches_the_formula(bench, data, dtype):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, heads = data.draw(st.integers(0, bench.most(200, 9))), data.draw(st.integers(1, 5))
    half = data.draw(st.sampled_from([1, 4, 25, 32, 64]))
    head_dim = 2 * half + data.draw(st.sampled_from([0, 0, 1, 16]))
    x = normal(rng, (rows, heads + 1, head_dim), dtype)
    angle = rng.random((50, half)) * 6
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    index = rng.integers(0, 50, rows).astype(np.int32)
    with bench.scope():
        device_x = bench.put(x)
        bench.kernels.rope(device_x[:, 1:], bench.put(cos), bench.put(sin), index)
        got = bench.get(device_x)
    first, second = wide(x)[:, 1:, :half], wide(x)[:, 1:, half : 2 * half]
    c, s = wide(cos)[index][:, None], wide(sin)[index][:, None]
    want = wide(x)
    want[:, 1:, :half] = first * c - second * s
    want[:, 1:, half : 2 * half] = second * c + first * s
    assert_close(got, want, dtype)
    assert_same_bits(got[:, :1], x[:, :1])


@examples
@given(data=st.data(), dtype=dtypes, on_host=st.booleans())
def test_gathered_rows_are_copies(bench, data, dtype, on_host):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, columns = data.draw(sizes(bench))
    source = normal(rng, (data.draw(st.integers(1, 40)), columns), dtype)
    index = rng.integers(-3, len(source) + 12, rows).astype(np.int32)
    with bench.scope():
        out = bench.empty((rows, columns), dtype)
        there = index if on_host else bench.put(index)
        bench.kernels.gather_rows(bench.put(source), there, out, first_row=5)
        got = bench.get(out)
    want = np.zeros((rows, columns), dtype)
    inside = (index >= 5) & (index < 5 + len(source))
    want[inside] = source[index[inside] - 5]
    assert_same_bits(got, want)


@examples
@given(data=st.data(), dtype=dtypes, biased=st.booleans(), in_place=st.booleans())
def test_sums_round_once_in_order(bench, data, dtype, biased, in_place):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    (rows, columns), parts = data.draw(sizes(bench)), data.draw(st.integers(1, 5))
    x, bias = normal(rng, (parts, rows, columns), dtype), normal(rng, (columns,), dtype)
    total = np.zeros((rows, columns), np.float32)
    for part in x:
        total += part.astype(np.float32)
    if biased:
        total += bias.astype(np.float32)
    with bench.scope():
        device_x = bench.put(x)
        added = bench.empty((rows, columns), dtype)
        bench.kernels.add(device_x[0], device_x[-1], added)
        got_added = bench.get(added)
        out = device_x[0] if in_place else bench.empty((rows, columns), dtype)
        bench.kernels.sum_partials(device_x, bench.put(bias) if biased else None, out)
        got = bench.get(out)
    assert_same_bits(got, total.astype(dtype))
    wide_sum = x[0].astype(np.float32) + x[-1].astype(np.float32)
    assert_same_bits(got_added, wide_sum.astype(dtype))


@examples
@given(data=st.data(), dtype=dtypes)
def test_copies_between_strided_arrays(bench, data, dtype):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    (rows, columns), skip = data.draw(sizes(bench)), data.draw(st.integers(0, 4))
    x = normal(rng, (2 * rows, 3, columns + skip), dtype)
    with bench.scope():
        target = bench.put(normal(rng, (rows, 3, columns + 2), dtype))
        bench.kernels.copy(bench.put(x)[::2, :, skip:], target[..., 1:-1])
        got = bench.get(target)
    assert_same_bits(np.ascontiguousarray(got[..., 1:-1]), np.ascontiguousarray(x[::2, :, skip:]))
