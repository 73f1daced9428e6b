"""Kernels that work on rows one by one, and copies, on a GPU."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pympa.verify import reference
from support.compare import ALL_DTYPES, assert_close, assert_same_bits, normal, wide

examples = settings.get_profile("devices")
dtypes = st.sampled_from(ALL_DTYPES)


def sizes(rig):
    """Draw rows and columns, neither of them round."""
    columns = st.sampled_from([1, 7, 8, 16, 33]) | st.integers(1, rig.most(6000, 90))
    return st.tuples(st.integers(0, rig.most(300, 12)), columns)


@examples
@given(data=st.data(), dtype=dtypes, kind=st.sampled_from(["rms", "layer"]), biased=st.booleans())
def test_norms_match_the_formula_row_by_row(rig, data, dtype, kind, biased):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    (rows, columns), shift = data.draw(sizes(rig)), data.draw(st.integers(0, 5))
    x = normal(rng, (rows, columns + shift), dtype, 3.0)
    weight, bias = normal(rng, (columns,), dtype), normal(rng, (columns,), dtype)

    with rig.scope():
        device_x, device_weight = rig.put(x)[:, shift:], rig.put(weight)
        device_bias = rig.put(bias) if biased else None

        def run(part):
            out = rig.empty((len(range(rows)[part]), columns), dtype)
            rig.kernels.norm(device_x[part], device_weight, device_bias, out, eps=1e-5, kind=kind)
            return rig.get(out)

        got = run(slice(None))
        assert_same_bits(run(slice(rows // 3, None)), got[rows // 3 :])
    wide_bias = wide(bias) if biased else None
    assert_close(
        got, reference.norm(wide(x[:, shift:]), wide(weight), wide_bias, 1e-5, kind), dtype
    )


@examples
@given(data=st.data(), dtype=dtypes)
def test_rope_matches_the_formula(rig, data, dtype):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, heads = data.draw(st.integers(0, rig.most(200, 9))), data.draw(st.integers(1, 5))
    half = data.draw(st.sampled_from([1, 4, 25, 32, 64]))
    head_dim = 2 * half + data.draw(st.sampled_from([0, 0, 1, 16]))
    x = normal(rng, (rows, heads + 1, head_dim), dtype)
    angle = rng.random((50, half)) * 6
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    index = rng.integers(0, 50, rows).astype(np.int32)
    with rig.scope():
        device_x = rig.put(x)
        rig.kernels.rope(device_x[:, 1:], rig.put(cos), rig.put(sin), index)
        got = rig.get(device_x)
    first, second = wide(x)[:, 1:, :half], wide(x)[:, 1:, half : 2 * half]
    c, s = wide(cos)[index][:, None], wide(sin)[index][:, None]
    want = wide(x)
    want[:, 1:, :half] = first * c - second * s
    want[:, 1:, half : 2 * half] = second * c + first * s
    assert_close(got, want, dtype)
    assert_same_bits(got[:, :1], x[:, :1])


@examples
@given(data=st.data(), dtype=dtypes, on_host=st.booleans())
def test_gathered_rows_are_copies(rig, data, dtype, on_host):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, columns = data.draw(sizes(rig))
    source = normal(rng, (data.draw(st.integers(1, 40)), columns), dtype)
    index = rng.integers(-3, len(source) + 12, rows).astype(np.int32)
    with rig.scope():
        out = rig.empty((rows, columns), dtype)
        there = index if on_host else rig.put(index)
        rig.kernels.gather_rows(rig.put(source), there, out, first_row=5)
        got = rig.get(out)
    want = np.zeros((rows, columns), dtype)
    inside = (index >= 5) & (index < 5 + len(source))
    want[inside] = source[index[inside] - 5]
    assert_same_bits(got, want)


@examples
@given(data=st.data(), dtype=dtypes, biased=st.booleans(), in_place=st.booleans())
def test_sums_round_once_in_order(rig, data, dtype, biased, in_place):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    (rows, columns), parts = data.draw(sizes(rig)), data.draw(st.integers(1, 5))
    x, bias = normal(rng, (parts, rows, columns), dtype), normal(rng, (columns,), dtype)
    total = np.zeros((rows, columns), np.float32)
    for part in x:
        total += part.astype(np.float32)
    if biased:
        total += bias.astype(np.float32)
    with rig.scope():
        device_x = rig.put(x)
        added = rig.empty((rows, columns), dtype)
        rig.kernels.add(device_x[0], device_x[-1], added)
        got_added = rig.get(added)
        out = device_x[0] if in_place else rig.empty((rows, columns), dtype)
        rig.kernels.sum_partials(device_x, rig.put(bias) if biased else None, out)
        got = rig.get(out)
    assert_same_bits(got, total.astype(dtype))
    wide_sum = x[0].astype(np.float32) + x[-1].astype(np.float32)
    assert_same_bits(got_added, wide_sum.astype(dtype))


@examples
@given(data=st.data(), dtype=dtypes)
def test_copies_between_strided_arrays(rig, data, dtype):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    (rows, columns), skip = data.draw(sizes(rig)), data.draw(st.integers(0, 4))
    x = normal(rng, (2 * rows, 3, columns + skip), dtype)
    with rig.scope():
        target = rig.put(normal(rng, (rows, 3, columns + 2), dtype))
        rig.kernels.copy(rig.put(x)[::2, :, skip:], target[..., 1:-1])
        got = rig.get(target)
    assert_same_bits(np.ascontiguousarray(got[..., 1:-1]), np.ascontiguousarray(x[::2, :, skip:]))


def test_copies_repeat_axes_of_one(rig):
    """As latent attention gives every head the rotated part of a key."""
    x = normal(np.random.default_rng(0), (7, 1, 6), np.float16)
    with rig.scope():
        target = rig.put(normal(np.random.default_rng(1), (7, 5, 16), np.float16))
        rig.kernels.copy(rig.put(x), target[..., 10:])
        got = rig.get(target)
    assert_same_bits(np.ascontiguousarray(got[..., 10:]), np.repeat(x, 5, axis=1))
