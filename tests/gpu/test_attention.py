"""Attention on a GPU against float64, and the bits that must not change."""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pympa.kernels import AttentionSpec, KvBlock
from pympa.plan.layout import Layout, Range
from pympa.verify import reference
from support.compare import HALVES, assert_close, assert_lse_close, assert_same_bits, normal, wide
from support.lanes import FULL
from support.shapes import attend, attention_of, attentions

examples = settings.get_profile("devices")


@examples
@given(data=st.data())
def test_matches_the_formula(rig, data):
    call = data.draw(attentions(rig))
    o, lse = attention_of(rig, call)
    want_o, want_lse = call.expected()
    assert_lse_close(lse, want_lse, call.dtype)
    assert not o[np.isneginf(want_lse)].any(), "rows that see nothing give 0"
    assert_close(o, want_o, call.dtype)


@FULL
@examples
@given(data=st.data())
def test_the_same_call_gives_the_same_bits(rig, data):
    """What moves from run to run is a race."""
    call = data.draw(attentions(rig))
    first, first_lse = attention_of(rig, call)
    for _ in range(rig.most(5, 1)):
        o, lse = attention_of(rig, call)
        assert_same_bits(o, first)
        assert_same_bits(lse, first_lse)


@FULL
@examples
@given(data=st.data())
def test_a_row_has_its_bits_in_any_company(rig, data):
    call = data.draw(attentions(rig))
    whole, whole_lse = attention_of(rig, call)
    rows = len(call.q)
    start = data.draw(st.integers(0, max(rows - 1, 0)))
    count = data.draw(st.sampled_from([1, 2, 16, 64, 65, rows]))
    part = slice(start, min(start + count, rows))
    o, lse = attention_of(rig, call, part)
    assert_same_bits(o, whole[part])
    assert_same_bits(lse, whole_lse[part])


@FULL
@examples
@given(data=st.data())
def test_nan_in_v_reaches_only_rows_that_see_it(rig, data):
    call = data.draw(attentions(rig))
    call.spec = replace(call.spec, decode=data.draw(st.booleans()))
    keys = len(call.k)
    broken = data.draw(st.lists(st.integers(0, max(keys - 1, 0)), max_size=min(keys, 5)))
    call.v[broken] = 0
    plain, plain_lse = attention_of(rig, call)
    call.v[broken] = np.nan
    o, lse = attention_of(rig, call)
    reached = call.sees()[:, broken].any(axis=1)
    assert_same_bits(lse, plain_lse)
    assert_same_bits(o[~reached], plain[~reached])
    assert np.isnan(wide(o[reached])).all()


@FULL
@examples
@given(data=st.data())
def test_a_carried_state_gives_the_bits_of_one_call(rig, data):
    call = data.draw(attentions(rig, plain=True))
    whole, whole_lse = attention_of(rig, call)
    cuts = [*range(0, len(call.k), 512 * data.draw(st.integers(1, 2))), len(call.k)]
    with rig.scope():
        state = rig.new_state(len(call.q), call.q.shape[1], call.v.shape[2])
        for first, last in itertools.pairwise(cuts):
            attend(rig, call, state, keys=slice(first, last))
        o, lse = rig.finish(state, call.dtype)
    assert_same_bits(o, whole)
    assert_same_bits(lse, whole_lse)


@FULL
@examples
@given(data=st.data())
def test_merged_states_match_the_formula(rig, data):
    call = data.draw(attentions(rig))
    cut = data.draw(st.integers(0, len(call.k)))
    with rig.scope():
        shape = (len(call.q), call.q.shape[1], call.v.shape[2])
        state, other = rig.new_state(*shape), rig.new_state(*shape)
        attend(rig, call, state, keys=slice(0, cut))
        attend(rig, call, other, keys=slice(cut, None))
        rig.kernels.merge(state, other)
        o, lse = rig.finish(state, call.dtype)
    want_o, want_lse = call.expected()
    assert_lse_close(lse, want_lse, call.dtype)
    assert_close(o, want_o, call.dtype)


@examples
@given(data=st.data())
def test_scores_and_folds_of_a_tile_match_the_formula(rig, data):
    """Keys of one tile of 512, in two slices of head_dim whose scores add up."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from(HALVES))
    rows, keys = (data.draw(st.integers(1, rig.most(m, 40))) for m in (200, 480))
    k_start = data.draw(st.sampled_from([0, 512, 512 + 32]))
    q_start = data.draw(st.integers(0, k_start + keys))
    dims, v_dim = [data.draw(st.sampled_from([8, 33, 64])) for _ in range(2)], 72
    q, k = (normal(rng, (n, h, sum(dims)), dtype) for n, h in ((rows, 3), (keys, 2)))
    v = normal(rng, (keys, 2, v_dim), dtype)
    spec = AttentionSpec(np.array([0, 0, 1], np.int32), sum(dims) ** -0.5, data.draw(st.booleans()))
    with rig.scope():
        device_q, device_k = rig.put(q), rig.put(k)
        scores = np.zeros((rows, 3, keys), np.float32)
        for first, last in ((0, dims[0]), (dims[0], sum(dims))):
            part = rig.empty(scores.shape, np.float32)
            rig.kernels.score_tile(
                device_q[..., first:last], device_k[..., first:last], spec.kv_head_of_q, part
            )
            scores += rig.get(part)
        state = rig.new_state(rows, 3, v_dim)
        rig.kernels.fold_tile(rig.put(scores), q_start, k_start, rig.put(v), state, spec)
        o, lse = rig.finish(state, dtype)
    want_scores = np.einsum("rhd,khd->rhk", wide(q), wide(k)[:, spec.kv_head_of_q])
    assert_close(scores, want_scores, np.float32)  # products are exact, sums are float32
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
    assert_lse_close(lse, want_lse, dtype)
    assert_close(o, want_o, dtype)


@FULL
@examples
@given(data=st.data())
def test_decoding_matches_the_formula_whoever_else_decodes(rig, data):
    """One row of each of some sequences: alone, and together."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype, head_dim = data.draw(st.sampled_from(HALVES)), data.draw(st.sampled_from([64, 128, 512]))
    most = rig.most(5000, 600)
    lengths = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=rig.most(5, 2)))
    kv_head_of_q = np.array([0, 0, 0, 1, 1], np.int32)
    spec = AttentionSpec(kv_head_of_q, head_dim**-0.5, True, decode=data.draw(st.booleans()))
    q = normal(rng, (len(lengths), 5, head_dim), dtype)
    k, v = (normal(rng, (sum(lengths), 2, head_dim), dtype) for _ in range(2))

    def decode(sequences: list[int]) -> tuple[np.ndarray, np.ndarray]:
        starts = np.cumsum([0, *lengths])
        keys = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in sequences])
        q_layout = Layout(tuple(Range(s, lengths[s] - 1, 1) for s in sequences))
        kv_layout = Layout(tuple(Range(s, 0, lengths[s]) for s in sequences))
        with rig.scope():
            state = rig.new_state(len(sequences), 5, head_dim)
            kv = KvBlock(rig.put(k[keys]), rig.put(v[keys]), kv_layout)
            rig.kernels.attend_block(rig.put(q[sequences]), q_layout, kv, state, spec)
            return rig.finish(state, dtype)

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
        assert_lse_close(together_lse[sequence : sequence + 1], want_lse, dtype)
        alone, alone_lse = decode([sequence])
        assert_same_bits(alone, together[sequence : sequence + 1])
        assert_same_bits(alone_lse, together_lse[sequence : sequence + 1])
        start += length
