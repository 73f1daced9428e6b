"""Routing on a GPU: what is chosen, sorted, counted, dropped and combined."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from support.compare import (
    ALL_DTYPES,
    assert_close,
    assert_each_close,
    assert_same_bits,
    normal,
    wide,
)

examples = settings.get_profile("devices")


@examples
@given(data=st.data(), renormalize=st.booleans(), ties=st.booleans())
def test_selection_matches_the_formula(rig, data, renormalize, ties):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, count = (data.draw(st.integers(1, rig.most(m, s))) for m, s in ((400, 20), (300, 40)))
    choices = data.draw(st.integers(1, min(count, 12)))
    logits = (rng.standard_normal((rows, count)) * 4).astype(np.float32)
    if ties:
        logits = np.round(logits)
    with rig.scope():
        experts = rig.empty((rows, choices), np.int32)
        weights = rig.empty((rows, choices), np.float32)
        device_logits = rig.put(logits)
        broken = rig.kernels.select_experts(
            device_logits, experts, weights, renormalize=renormalize
        )
        got_experts, got_weights = rig.get(experts), rig.get(weights)
    assert broken == -1
    probabilities = np.exp(wide(logits) - wide(logits).max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    want = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :choices], axis=1)
    want_weights = np.take_along_axis(probabilities, want, axis=1)
    if renormalize:
        want_weights /= want_weights.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(got_experts, want)
    assert_each_close(got_weights, want_weights, np.float32)


def test_logits_that_are_not_finite_are_reported(rig):
    logits = np.random.default_rng(0).standard_normal((90, 37)).astype(np.float32)
    logits[17, 36], logits[11, 0], logits[80, 5] = np.nan, np.inf, -np.inf
    with rig.scope():
        experts = rig.empty((90, 3), np.int32)
        weights = rig.empty((90, 3), np.float32)
        broken = rig.kernels.select_experts(rig.put(logits), experts, weights, renormalize=False)
        assert broken == 11
        assert not rig.get(weights)[[11, 17, 80]].any()


@examples
@given(data=st.data())
def test_sorting_counting_and_dropping(rig, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, count = data.draw(st.integers(0, rig.most(3000, 60))), data.draw(st.integers(1, 70))
    choices = data.draw(st.integers(1, 8))
    experts = rng.integers(-1, count, (rows, choices)).astype(np.int32)
    cuts = np.sort(rng.integers(0, rows + 1, data.draw(st.integers(0, 4))))
    segment_rows = np.diff([0, *cuts, rows]).astype(np.int64)
    capacity = rng.integers(0, 2 + 2 * rows // count, len(segment_rows)).astype(np.int64)
    used = rng.integers(0, 3, (len(segment_rows), count)).astype(np.int64)
    with rig.scope():
        device_experts = rig.put(experts)
        sources = rig.empty((rows * choices,), np.int32)
        inverse = rig.empty((rows, choices), np.int32)
        counts = rig.kernels.sort_rows(device_experts, count, sources, inverse)
        by_segment = rig.kernels.count_experts(device_experts, segment_rows, count)
        now_used = used.copy()
        rig.kernels.drop_overflow(device_experts, segment_rows, now_used, capacity)
        got_sources, got_places = rig.get(sources), rig.get(inverse)
        kept = rig.get(device_experts)
    flat = experts.ravel()
    pairs = np.flatnonzero(flat >= 0)
    order = pairs[np.argsort(flat[pairs], kind="stable")]
    np.testing.assert_array_equal(counts, np.bincount(flat[pairs], minlength=count))
    np.testing.assert_array_equal(got_sources[: len(order)], order // choices)
    want_inverse = np.full(flat.size, -1)
    want_inverse[order] = np.arange(len(order))
    np.testing.assert_array_equal(got_places.ravel(), want_inverse)
    want_used, want_kept, start = used.copy(), experts.copy(), 0
    for segment, length in enumerate(segment_rows):
        part = want_kept[start : start + length]
        here = part[part >= 0]
        np.testing.assert_array_equal(by_segment[segment], np.bincount(here, minlength=count))
        for place, expert in np.ndenumerate(part):
            if expert >= 0 and want_used[segment, expert] < capacity[segment]:
                want_used[segment, expert] += 1
            else:
                part[place] = -1
        start += length
    np.testing.assert_array_equal(kept, want_kept)
    np.testing.assert_array_equal(now_used, want_used)


@examples
@given(data=st.data(), dtype=st.sampled_from(ALL_DTYPES), with_base=st.booleans())
def test_combined_rows_match_the_formula_row_by_row(rig, data, dtype, with_base):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    m, n = (data.draw(st.integers(1, rig.most(500, 20))) for _ in range(2))
    choices, columns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, rig.most(900, 40)))
    rows = normal(rng, (m, columns), dtype)
    inverse = rng.integers(-1, m, (n, choices)).astype(np.int32)
    weights = rng.random((n, choices), np.float32)
    base = normal(rng, (n, columns), dtype) if with_base else None
    with rig.scope():
        device_rows = rig.put(rows)

        def run(part):
            length = len(range(n)[part])
            out = rig.empty((length, columns), dtype)
            rig.kernels.combine_rows(
                device_rows,
                rig.put(inverse[part]),
                rig.put(weights[part]),
                None if base is None else rig.put(base[part]),
                out,
            )
            return rig.get(out)

        got = run(slice(None))
        assert_same_bits(run(slice(n // 2, None)), got[n // 2 :])
    taken = np.where(inverse[..., None] >= 0, wide(rows)[inverse], 0.0)
    want = (wide(weights)[..., None] * taken).sum(axis=1) + (wide(base) if with_base else 0.0)
    assert_close(got, want, dtype)
