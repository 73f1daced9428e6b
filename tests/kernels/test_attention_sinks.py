"""Attention with sinks: a score of each head that takes probability and has no value."""

import numpy as np
import pytest

from support.compare import (
    ALL_DTYPES,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    normal,
    wide,
)

HEADS = 3


@pytest.fixture
def kernels(attention_kernels):
    return attention_kernels


def draw(rng, dtype, rows, keys, v_head_dim=40):
    q = normal(rng, (rows, HEADS, 32), dtype, 1.5)
    k, v = normal(rng, (keys, 1, 32), dtype, 1.5), normal(rng, (keys, 1, v_head_dim), dtype)
    return q, k, v, normal(rng, HEADS, dtype, 2.0)


def start(kernels, rows, v_head_dim, sinks):
    """Return a state with sinks; before, all of it is NaN."""
    shapes = (rows, HEADS), (rows, HEADS), (rows, HEADS, v_head_dim)
    state = tuple(np.full(shape, np.nan, np.float32) for shape in shapes)
    kernels.core.start_state(*state, sinks, kernels.on())
    return state


def formula(q, k, v, sinks, q_start, window=0):
    """Return o and lse in float64: a softmax over scores and the sink, whose column is dropped."""
    o, lse = np.zeros((*q.shape[:2], v.shape[2])), np.zeros(q.shape[:2])
    positions = np.arange(len(k))
    for row, head in np.ndindex(q.shape[:2]):
        seen = positions <= q_start + row
        if window:
            seen &= positions > q_start + row - window
        scores = np.append(wide(k)[seen, 0] @ wide(q)[row, head] * 32**-0.5, wide(sinks)[head])
        lse[row, head] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        o[row, head] = np.exp(scores[:-1] - lse[row, head]) @ wide(v)[seen, 0]
    return o, lse


def fold(kernels, state, q, k, v, q_start, first=0, **options):
    kernels.attend(
        q, k, v, state, q_ranges=[(0, q_start, len(q))], k_ranges=[(0, first, len(k))], **options
    )


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 1100), (2, 640), (5, 700), (120, 600)])
def test_matches_the_formula(kernels, dtype, rng, rows, keys, window, decode):
    q, k, v, sinks = draw(rng, dtype, rows, keys)
    state = start(kernels, rows, 40, sinks)
    fold(kernels, state, q, k, v, keys - rows, window=window, decode=decode)
    o, lse = kernels.finish(state, dtype)
    want_o, want_lse = formula(q, k, v, sinks, keys - rows, window)
    assert_close(o, want_o, dtype)
    assert_lse_close(lse, want_lse, dtype)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("size", [-30.0, 30.0])
def test_sinks_far_from_the_scores(kernels, dtype, rng, size, decode):
    """Where the sink has all probability, and where it has none."""
    q, k, v, _ = draw(rng, dtype, 7, 530)
    sinks = np.full(HEADS, size, dtype)
    state = start(kernels, 7, 40, sinks)
    fold(kernels, state, q, k, v, 523, decode=decode)
    o, lse = kernels.finish(state, dtype)
    want_o, want_lse = formula(q, k, v, sinks, 523)
    assert_lse_close(lse, want_lse, dtype)
    if size < 0:
        assert_close(o, want_o, dtype)
    else:  # sums of products that are rounded to the dtype before they are divided
        assert np.abs(wide(o)).max() < 1e-8


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("cut", [1, 64, 300, 512])
def test_blocks_and_merged_states(kernels, dtype, rng, cut, decode):
    q, k, v, sinks = draw(rng, dtype, 4, 700)
    want_o, want_lse = formula(q, k, v, sinks, 696)
    carried, other = start(kernels, 4, 40, sinks), kernels.new_state(4, HEADS, 40)
    fold(kernels, carried, q, k[:cut], v[:cut], 696, decode=decode)
    merged = tuple(part.copy() for part in carried)
    fold(kernels, carried, q, k[cut:], v[cut:], 696, cut, decode=decode)
    fold(kernels, other, q, k[cut:], v[cut:], 696, cut, decode=decode)
    kernels.core.merge(*other, *merged, kernels.on())
    for state in (carried, other):
        o, lse = kernels.finish(state, dtype)
        assert_close(o, want_o, dtype)
        assert_lse_close(lse, want_lse, dtype)


@pytest.mark.parametrize("decode", [False, True])
def test_rows_without_keys(kernels, dtype, rng, decode):
    """o = 0 and lse = sink, in a call in which other rows see keys, and where nothing is folded."""
    q, k, v, sinks = draw(rng, dtype, 6, 20)
    state, untouched = (start(kernels, 6, 40, sinks) for _ in range(2))
    kernels.attend(
        q, k, v, state, q_ranges=[(0, 7, 6)], k_ranges=[(0, 10, 20)], decode=decode
    )  # rows 0 to 2 are before all keys
    for rows, seen in ((slice(0, 3), state), (slice(0, 6), untouched)):
        o, lse = kernels.finish(seen, dtype)
        assert not o[rows].any()
        assert (wide(lse[rows]) == wide(sinks)).all()
    empty = kernels.new_state(6, HEADS, 40)
    kernels.core.merge(*empty, *untouched, kernels.on())
    for got, want in zip(empty, untouched, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("sink_dtype", ALL_DTYPES)
@pytest.mark.parametrize(("rows", "threads"), [(0, 1), (1, 1), (37, 3)])
def test_sinks_of_any_dtype(all_kernels, rng, sink_dtype, rows, threads):
    sinks = normal(rng, HEADS + 2, sink_dtype)[1:-1]
    state = (np.zeros((rows, HEADS), np.float32), np.zeros((rows, HEADS), np.float32))
    out = np.full((rows, HEADS, 5), np.nan, np.float32)
    all_kernels.core.start_state(*state, out, sinks, all_kernels.on(threads))
    assert_same_bits(state[0], np.broadcast_to(sinks.astype(np.float32), (rows, HEADS)))
    assert (state[1] == 1).all()
    assert not out.any()


def test_other_sinks_are_refused(all_kernels):
    state = (np.zeros((2, HEADS), np.float32),) * 2 + (np.zeros((2, HEADS, 5), np.float32),)
    on = all_kernels.on()
    with pytest.raises(ValueError, match=r"start_state: sinks: expected shape \[3\], got \[2\]"):
        all_kernels.core.start_state(*state, np.zeros(2, np.float32), on)
    with pytest.raises(ValueError, match=r"start_state: sinks: expected dtype .*, got int32"):
        all_kernels.core.start_state(*state, np.zeros(HEADS, np.int32), on)


def test_a_broken_sink_reaches_its_head_only(kernels, dtype, rng):
    q, k, v, sinks = draw(rng, dtype, 3, 90)
    sinks[1] = np.nan
    state = start(kernels, 3, 40, sinks)
    fold(kernels, state, q, k, v, 87)
    o, _ = kernels.finish(state, dtype)
    broken = np.isnan(wide(o))
    assert broken[:, 1].all()
    assert not broken[:, [0, 2]].any()
