"""Mixture of experts: routing against plain NumPy, and the bits of what comes back."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa import _core
from pympa.kernels import MlpWeights
from pympa.kernels.virtual import VirtualKernels
from pympa.runtime.arena import Arena
from pympa.runtime.trace import Trace
from pympa.spec import Routing
from pympa.verify import reference
from support.compare import assert_close, assert_same_bits, normal, wide

ISA = _core.supported_isas()[0]
examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def kernels(all_kernels):
    return all_kernels


@st.composite
def routings(draw):
    """Return ids [rows, choices] of `count` experts; -1 is dropped, all may agree."""
    count, choices = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    used = draw(st.lists(st.integers(-1, count - 1), min_size=1, max_size=count))
    rows = draw(st.integers(0, 40))
    ids = draw(st.lists(st.sampled_from(used), min_size=rows * choices, max_size=rows * choices))
    return np.array(ids, np.int32).reshape(rows, choices), count


@examples
@given(routings())
def test_sorting_loses_nothing(kernels, routing):
    experts, count = routing
    counts = np.full(count, -7, np.int64)
    sources = np.full(experts.size, -7, np.int32)
    inverse = np.full(experts.shape, -7, np.int32)
    kernels.core.sort_rows(experts, counts, sources, inverse, kernels.on())
    flat = experts.ravel()
    kept = np.flatnonzero(flat >= 0)
    order = kept[np.argsort(flat[kept], kind="stable")]
    np.testing.assert_array_equal(counts, np.bincount(flat[kept], minlength=count))
    np.testing.assert_array_equal(sources[: len(order)], order // max(experts.shape[1], 1))
    assert (sources[len(order) :] == -7).all()
    want_inverse = np.full(flat.size, -1)
    want_inverse[order] = np.arange(len(order))
    np.testing.assert_array_equal(inverse.ravel(), want_inverse)


def test_sorting_of_strided_choices(kernels):
    wide_experts = np.array([[1, 9, 0], [0, 9, 2], [1, 9, 1]], np.int32)
    experts, counts = wide_experts[:, ::2].copy(), np.zeros(3, np.int64)
    parts = np.zeros((3, 5), np.int32)
    parts[:, 1:3] = experts
    sources, inverse = np.zeros(6, np.int32), np.zeros((3, 4), np.int32)
    kernels.core.sort_rows(parts[:, 1:3], counts, sources, inverse[:, 1:3], kernels.on())
    np.testing.assert_array_equal(counts, [2, 3, 1])
    np.testing.assert_array_equal(sources, [0, 1, 0, 2, 2, 1])
    np.testing.assert_array_equal(inverse, [[0, 2, 0, 0], [0, 1, 5, 0], [0, 3, 4, 0]])


@st.composite
def segments(draw, rows):
    """Return rows of consecutive segments, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=4)))
    return np.diff([0, *cuts, rows]).astype(np.int64)


@examples
@given(routings(), st.data())
def test_counting_and_dropping_by_segment(kernels, routing, data):
    experts, count = routing
    segment_rows = data.draw(segments(len(experts)))
    shape = (len(segment_rows), count)
    counts = np.full(shape, -7, np.int64)
    kernels.core.count_experts(experts, segment_rows, counts, kernels.on())
    parts = np.split(experts, np.cumsum(segment_rows)[:-1])
    want = [np.bincount(part[part >= 0], minlength=count) for part in parts]
    np.testing.assert_array_equal(counts, np.reshape(want, shape))

    used = np.array(
        data.draw(st.lists(st.integers(0, 5), min_size=counts.size, max_size=counts.size))
    )
    used = used.reshape(shape).astype(np.int64)
    capacity = np.array([data.draw(st.integers(0, 8)) for _ in segment_rows], np.int64)
    want_used, want_experts = used.copy(), []
    for segment, part in enumerate(parts):
        for e in part.ravel():
            fits = e >= 0 and want_used[segment, e] < capacity[segment]
            want_used[segment, e] += fits
            want_experts.append(e if fits else -1)
    dropped = experts.copy()
    kernels.core.drop_overflow(dropped, segment_rows, used, capacity, kernels.on())
    np.testing.assert_array_equal(dropped.ravel(), want_experts)
    np.testing.assert_array_equal(used, want_used)


def combine(kernels, rows, inverse, weights, base=None, gate=None, threads=1):
    out = np.full((len(inverse), rows.shape[1]), np.nan, rows.dtype)
    kernels.core.combine_rows(rows, inverse, weights, base, gate, out, kernels.on(threads))
    return out


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "choices", "columns"),
    [(20, 9, 2, 70), (1, 1, 1, 1), (50, 31, 8, 129), (0, 4, 2, 33), (5, 0, 2, 16), (6, 3, 0, 20)],
)
def test_combine(kernels, dtype, rng, m, n, choices, columns, with_base):
    rows = normal(rng, (m, columns + 3), dtype)[:, 2 : 2 + columns]
    inverse = rng.integers(-1, m, (n, choices)).astype(np.int32)
    weights = rng.random((n, choices), np.float32)
    base = normal(rng, (n, columns), dtype) if with_base else None
    out = combine(kernels, rows, inverse, weights, base)
    padded = np.concatenate([wide(rows), np.zeros((1, columns))])  # row -1 adds nothing
    want = np.einsum("nc,ncd->nd", wide(weights), padded[inverse])
    assert_close(out, want + wide(base) if with_base else want, dtype)
    if with_base:
        kernels.core.combine_rows(rows, inverse, weights, base, None, base, kernels.on(1))
        assert base.tobytes() == out.tobytes()


def test_combine_goes_by_ascending_choice_from_zero(kernels, rng):
    """Weights of powers of two make every product exact, so plain float32 sums show the order."""
    rows, base = normal(rng, (12, 50), np.float32), normal(rng, (7, 50), np.float32)
    inverse = rng.integers(0, 12, (7, 5)).astype(np.int32)
    weights = (0.5 ** rng.integers(0, 4, (7, 5))).astype(np.float32)
    total = np.zeros((7, 50), np.float32)
    for choice in range(5):
        total += weights[:, choice, None] * rows[inverse[:, choice]]
    assert_same_bits(combine(kernels, rows, inverse, weights, base), total + base)


@examples
@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_bits_of_a_combined_row(kernels, dtype, n, choices, columns, seed):
    rng = np.random.default_rng(seed)
    rows, base = normal(rng, (17, columns), dtype), normal(rng, (n, columns), dtype)
    inverse = rng.integers(-1, 17, (n, choices)).astype(np.int32)
    weights = rng.random((n, choices), np.float32)
    whole = combine(kernels, rows, inverse, weights, base)
    assert combine(kernels, rows, inverse, weights, base, threads=3).tobytes() == whole.tobytes()
    first, last = sorted(rng.integers(0, n + 1, 2))
    part = combine(
        kernels, rows, inverse[first:last], weights[first:last], base[first:last], threads=2
    )
    assert part.tobytes() == whole[first:last].tobytes()


@pytest.mark.parametrize(
    ("m", "n", "choices", "columns"),
    [(20, 9, 2, 70), (1, 1, 1, 1), (50, 31, 8, 129), (0, 4, 2, 33), (5, 0, 2, 16), (6, 3, 0, 20)],
)
def test_combine_with_a_gate(kernels, dtype, rng, m, n, choices, columns):
    rows, base = normal(rng, (m, columns), dtype), normal(rng, (n, columns), dtype)
    inverse = rng.integers(-1, m, (n, choices)).astype(np.int32)
    weights = rng.random((n, choices), np.float32)
    memory = normal(rng, (n, 3), np.float32, 3.0)
    gate = memory[:, 1:2]
    out = combine(kernels, rows, inverse, weights, base, gate)
    padded = np.concatenate([wide(rows), np.zeros((1, columns))])
    want = np.einsum("nc,ncd->nd", wide(weights), padded[inverse])
    assert_close(out, want + wide(base) / (1 + np.exp(-wide(gate))), dtype)
    assert_same_bits(combine(kernels, rows, inverse, weights, base, gate, threads=3), out)
    if n > 1:
        part = combine(kernels, rows, inverse[1:], weights[1:], base[1:], gate[1:])
        assert_same_bits(part, out[1:])
    kernels.core.combine_rows(rows, inverse, weights, base, gate, base, kernels.on(1))
    assert_same_bits(base, out)


def test_gates_at_their_ends(kernels, dtype, rng):
    """A gate of nothing leaves the sum, an open one adds the base; NaN reaches its row only."""
    rows, base = normal(rng, (7, 50), dtype), normal(rng, (4, 50), dtype)
    inverse = rng.integers(0, 7, (4, 2)).astype(np.int32)
    weights = rng.random((4, 2), np.float32)
    gate = np.array([[-1e30], [1e30], [np.nan], [0.0]], np.float32)
    out = combine(kernels, rows, inverse, weights, base, gate)
    assert_same_bits(out[:1], combine(kernels, rows, inverse, weights)[:1])
    assert_same_bits(out[1:2], combine(kernels, rows, inverse, weights, base)[1:2])
    assert np.isnan(wide(out)).all(axis=1).tolist() == [False, False, True, False]
    half = (base.astype(np.float32) / 2).astype(dtype)
    assert_close(out[3:], combine(kernels, rows, inverse, weights, half)[3:], dtype)


def rows_of(source):
    return lambda index, first, last, _: source[index, first:last]


def test_a_layer_from_end_to_end(cpu_kernels, dtype, rng):
    """Gate, select, sort, gather, both linears and combine, as a model calls them."""
    ours = cpu_kernels.kernels
    rows, width, hidden, count, choices = 50, 24, 40, 5, 2
    x = normal(rng, (rows, width), dtype)
    gate = normal(rng, (1, count, width), dtype)
    up = normal(rng, (count, hidden, width), dtype, width**-0.5)
    down = normal(rng, (count, width, hidden), dtype, hidden**-0.5)
    packed_gate = ours.pack((count, width), dtype, partial(rows_of(gate), 0))
    packed_up = ours.pack_group(count, (hidden, width), dtype, rows_of(up))
    packed_down = ours.pack_group(count, (width, hidden), dtype, rows_of(down))

    logits, weights = np.empty((rows, count), np.float32), np.empty((rows, choices), np.float32)
    experts, inverse = np.empty((2, rows, choices), np.int32)
    sources = np.empty(rows * choices, np.int32)
    sent = np.empty((rows * choices, width), dtype)
    between = np.empty((rows * choices, hidden), dtype)
    out = np.empty((rows, width), dtype)
    ours.linear(x, packed_gate, logits)
    assert ours.select_experts(logits, experts, weights, renormalize=True) == -1
    counts = ours.sort_rows(experts, count, sources, inverse)
    ours.gather_rows(x, sources, sent)
    ours.linear(sent, packed_up, between, activation="silu", group_rows=counts)
    ours.linear(between, packed_down, sent, group_rows=counts)
    ours.combine_rows(sent, inverse, weights, None, out)

    np.testing.assert_array_equal(ours.count_experts(experts, np.array([rows]), count), [counts])
    want = np.zeros((rows, width))
    for row, choice in np.ndindex(rows, choices):
        e = experts[row, choice]
        inside = reference.activate(wide(up[e]) @ wide(x[row]), "silu")
        want[row] += weights[row, choice] * (wide(down[e]) @ inside)
    assert_close(out, want, dtype)


def test_a_group_is_packed_like_single_weights(cpu_kernels, dtype, rng):
    ours = cpu_kernels.kernels
    weights = normal(rng, (3, 33, 20), dtype)
    group = ours.pack_group(3, (33, 20), dtype, rows_of(weights))
    assert (group.n, group.k) == (33, 20)
    for index, packed in enumerate(group.data):
        assert_same_bits(packed, cpu_kernels.pack(weights[index]))


def test_shapes_alone():
    arena = Arena(dry=True)
    virtual = VirtualKernels(isa=ISA, threads=1, arena=arena, trace=Trace())
    weights = virtual.pack_group(3, (8, 4), np.dtype(np.float32), lambda *_: pytest.fail("filled"))
    down = virtual.pack_group(3, (4, 8), np.dtype(np.float32), lambda *_: pytest.fail("filled"))
    one = virtual.pack((8, 4), np.dtype(np.float32), lambda *_: pytest.fail("filled"))
    assert weights.data.shape == (3, *one.data.shape)
    experts, inverse = arena.empty((7, 2), np.int32), arena.empty((7, 2), np.int32)
    sources, shares = arena.empty((14,), np.int32), arena.empty((7, 2), np.float32)
    logits, bias = arena.empty((7, 3), np.float32), arena.empty((3,), np.float32)
    assert virtual.select_experts(logits, experts, shares, renormalize=True) == -1
    assert virtual.sort_rows(experts, 3, sources, inverse).tolist() == [5, 5, 4]
    assert virtual.count_experts(experts, np.array([3, 4]), 3).tolist() == [[0] * 3] * 2
    x, out = arena.empty((14, 4), np.float32), arena.empty((14, 8), np.float32)
    before = arena.used_bytes
    virtual.gather_rows(x[:7], sources, x)
    virtual.drop_overflow(experts, np.array([7]), np.zeros((1, 3), np.int64), np.array([4]))
    virtual.linear(x, weights, out, group_rows=np.array([5, 5, 4]))
    gated = MlpWeights(weights, down, "silu", gate=weights)
    virtual.mlp(x, gated, x, group_rows=np.array([5, 5, 4]))
    virtual.combine_rows(out, inverse, shares, None, out[:7])
    virtual.combine_rows(out, inverse, shares, out[7:], out[:7], base_gate=logits[:, :1])
    routing = Routing(score="sigmoid", choice_bias=True)
    options = {"routing": routing, "choice_bias": bias}
    assert virtual.select_experts(logits, experts, shares, renormalize=True, **options) == -1
    clamped = replace(gated, activation="swiglu_clamped", limit=7.0, alpha=1.702)
    virtual.mlp(x, clamped, x, group_rows=np.array([5, 5, 4]))
    virtual.sum_squares(x, logits[:, :1])
    virtual.softcap(logits, 30.0)
    assert arena.used_bytes == before < arena.peak_bytes
