"""Attention on a GPU against float64, and the bits that must not change."""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.shapes import attend, attention_of, attentions
from on_device import HALVES, assert_close, assert_same_bits, normal, wide
from pympa import reference
from pympa.kernels import AttentionSpec, KvBlock
from pympa.layout import Layout, Range

examples = settings.get_profile("devices")


def assert_lse_close(lse, want):
    """A float32 sum of probabilities that were rounded to the dtype."""
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want))
    seen = np.isfinite(want)
    np.testing.assert_allclose(lse[seen], want[seen], atol=8e-3)


@examples
@given(data=st.data())
def test_matches_the_formula(bench, data):
    call = data.draw(attentions(bench))
    o, lse = attention_of(bench, call)
    want_o, want_lse = call.expected()
    assert_lse_close(lse, want_lse)
    assert not o[np.isneginf(want_lse)].any(), "rows that see nothing give 0"
    assert_close(o, want_o, call.dtype)


@examples
@given(data=st.data())
def test_the_same_call_gives_the_same_bits(bench, data):
    """What moves from run to run is a race."""
    call = data.draw(attentions(bench))
    first, first_lse = attention_of(bench, call)
    for _ in range(bench.most(5, 1)):
        o, lse = attention_of(bench, call)
        assert_same_bits(o, first)
        assert_same_bits(lse, first_lse)


@examples
@given(data=st.data())
def test_a_row_has_its_bits_in_any_company(bench, data):
    call = data.draw(attentions(bench))
    whole, whole_lse = attention_of(bench, call)
    rows = len(call.q)
    start = data.draw(st.integers(0, max(rows - 1, 0)))
    count = data.draw(st.sampled_from([1, 2, 16, 64, 65, rows]))
    part = slice(start, min(start + count, rows))
    o, lse = attention_of(bench, call, part)
    assert_same_bits(o, whole[part])
    assert_same_bits(lse, whole_lse[part])


@examples
@given(data=st.data())
def test_nan_in_v_reaches_only_rows_that_see_it(bench, data):
    call = data.draw(attentions(bench))
    call.spec = replace(call.spec, decode=data.draw(st.booleans()))
    keys = len(call.k)
    broken = data.draw(st.lists(st.integers(0, max(keys - 1, 0)), max_size=min(keys, 5)))
    call.v[broken] = 0
    plain, plain_lse = attention_of(bench, call)
    call.v[broken] = np.nan
    o, lse = attention_of(bench, call)
    reached = call.sees()[:, broken].any(axis=1)
    assert_same_bits(lse, plain_lse)
    assert_same_bits(o[~reached], plain[~reached])
    assert np.isnan(wide(o[reached])).all()


@examples
@given(data=st.data())
def test_a_carried_state_gives_the_bits_of_one_call(bench, data):
    call = data.draw(attentions(bench, plain=True))
    whole, whole_lse = attention_of(bench, call)
    cuts = [*range(0, len(call.k), 512 * data.draw(st.integers(1, 2))), len(call.k)]
    with bench.scope():
        state = bench.state(len(call.q), call.q.shape[1], call.v.shape[2])
        for first, last in itertools.pairwise(cuts):
            attend(bench, call, state, keys=slice(first, last))
        o, lse = bench.finished(state, call.dtype)
    assert_same_bits(o, whole)
    assert_same_bits(lse, whole_lse)


@examples
@given(data=st.data())
def test_merged_states_match_the_formula(bench, data):
    call = data.draw(attentions(bench))
    cut = data.draw(st.integers(0, len(call.k)))
    with bench.scope():
        shape = (len(call.q), call.q.shape[1], call.v.shape[2])
        state, other = bench.state(*shape), bench.state(*shape)
        attend(bench, call, state, keys=slice(0, cut))
        attend(bench, call, other, keys=slice(cut, None))
        bench.kernels.merge(state, other)
        o, lse = bench.finished(state, call.dtype)
    want_o, want_lse = call.expected()
    assert_lse_close(lse, want_lse)
    assert_close(o, want_o, call.dtype)


@examples
@given(data=st.data())
def test_scores_and_folds_of_a_tile_match_the_formula(bench, data):
    """Keys of one tile of 512, in two slices of head_dim whose scores add up."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from(HALVES))
    rows, keys = (data.draw(st.integers(1, bench.most(m, 40))) for m in (200, 480))
    k_start = data.draw(st.sampled_from([0, 512, 512 + 32]))
    q_start = data.draw(st.integers(0, k_start + keys))
    dims, v_dim = [data.draw(st.sampled_from([8, 33, 64])) for _ in range(2)], 72
    q, k = (normal(rng, (n, h, sum(dims)), dtype) for n, h in ((rows, 3), (keys, 2)))
    v = normal(rng, (keys, 2, v_dim), dtype)
    spec = AttentionSpec(np.array([0, 0, 1], np.int32), sum(dims) ** -0.5, data.draw(st.booleans()))
    with bench.scope():
        device_q, device_k = bench.put(q), bench.put(k)
        scores = np.zeros((rows, 3, keys), np.float32)
        for first, last in ((0, dims[0]), (dims[0], sum(dims))):
            part = bench.empty(scores.shape, np.float32)
            bench.kernels.score_tile(
                device_q[..., first:last], device_k[..., first:last], spec.kv_head_of_q, part
            )
            scores += bench.get(part)
        state = bench.state(rows, 3, v_dim)
        bench.kernels.fold_tile(bench.put(scores), q_start, k_start, bench.put(v), state, spec)
        o, lse = bench.finished(state, dtype)
    want_scores = np.einsum("rhd,khd->rhk", wide(q), wide(k)[:, spec.kv_head_of_q])
    assert np.linalg.norm(scores - want_scores) <= 1e-5 * np.linalg.norm(want_scores)
    want_o, want_lse = reference.attention(
        wide(q),
        wide(k),
        wide(v),
        q_start + np.arange(rows),
        k_start + np.arange(keys),
        kv_head_of_q=[0, 0, 1],
        scale=spec.scale,
        causal=spec.causal,
    )
    assert_lse_close(lse, want_lse)
    assert_close(o, want_o, dtype)


@examples
@given(data=st.data())
def test_decoding_matches_the_formula_whoever_else_decodes(bench, data):
    """One row of each of some sequences: alone, and together."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype, head_dim = data.draw(st.sampled_from(HALVES)), data.draw(st.sampled_from([64, 128, 512]))
    most = bench.most(5000, 600)
    lengths = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=bench.most(5, 2)))
    kv_head_of_q = np.array([0, 0, 0, 1, 1], np.int32)
    spec = AttentionSpec(kv_head_of_q, head_dim**-0.5, True, decode=data.draw(st.booleans()))
    q = normal(rng, (len(lengths), 5, head_dim), dtype)
    k, v = (normal(rng, (sum(lengths), 2, head_dim), dtype) for _ in range(2))

    def decode(sequences: list[int]) -> tuple[np.ndarray, np.ndarray]:
        starts = np.cumsum([0, *lengths])
        keys = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in sequences])
        q_layout = Layout(tuple(Range(s, lengths[s] - 1, 1) for s in sequences))
        kv_layout = Layout(tuple(Range(s, 0, lengths[s]) for s in sequences))
        with bench.scope():
            state = bench.state(len(sequences), 5, head_dim)
            kv = KvBlock(bench.put(k[keys]), bench.put(v[keys]), kv_layout)
            bench.kernels.attend_block(bench.put(q[sequences]), q_layout, kv, state, spec)
            return bench.finished(state, dtype)

    together, together_lse = decode(list(range(len(lengths))))
    start = 0
    for sequence, length in enumerate(lengths):
        keys = slice(start, start + length)
        want, want_lse = reference.attention(
            wide(q[sequence : sequence + 1]),
            wide(k[keys]),
            wide(v[keys]),
            np.array([length - 1]),
            np.arange(length),
            kv_head_of_q=kv_head_of_q.tolist(),
            scale=spec.scale,
        )
        assert_close(together[sequence : sequence + 1], want, dtype)
        assert_lse_close(together_lse[sequence : sequence + 1], want_lse)
        alone, alone_lse = decode([sequence])
        assert_same_bits(alone, together[sequence : sequence + 1])
        assert_same_bits(alone_lse, together_lse[sequence : sequence + 1])
        start += length
