"""What families of models ask of a GPU's kernels beyond the plain ones, against float64."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pympa.kernels import AttentionSpec, KvBlock, MlpWeights
from pympa.plan.layout import Layout, Range
from pympa.spec import Routing
from pympa.verify import reference
from support.compare import (
    ALL_DTYPES,
    HALVES,
    assert_close,
    assert_each_close,
    assert_lse_close,
    assert_same_bits,
    normal,
    wide,
)
from support.oracles import plain_select, rotated, swiglu_clamped

examples = settings.get_profile("devices")
dtypes = st.sampled_from(ALL_DTYPES)
seeds = st.integers(0, 2**32 - 1)


@examples
@given(data=st.data(), dtype=dtypes, seed=seeds)
def test_norms_of_parts_of_rows(rig, data, dtype, seed):
    rng = np.random.default_rng(seed)
    rows, columns = data.draw(st.integers(0, 9)), data.draw(st.integers(1, rig.most(9000, 90)))
    cut = data.draw(st.integers(0, columns))
    x, weight = normal(rng, (rows, columns), dtype, 3.0), normal(rng, (columns,), dtype)
    with rig.scope():
        device_x, device_weight = rig.put(x), rig.put(weight)
        squares, out = rig.empty((rows, 1), np.float32), rig.empty((rows, columns), dtype)
        rig.kernels.sum_squares(device_x, squares)
        got_squares = rig.get(squares)
        for part in (slice(0, cut), slice(cut, columns)):
            rig.kernels.norm(
                device_x[:, part], device_weight[part], None, out[:, part], eps=1e-5, kind="rms",
                offset=1.0, squares=squares, width=columns,
            )  # fmt: skip
        got = rig.get(out)
        rig.kernels.norm(device_x, device_weight, None, out, eps=1e-5, kind="rms", offset=1.0)
        assert_same_bits(rig.get(out), got)
    assert_each_close(got_squares, (wide(x) ** 2).sum(axis=1, keepdims=True), np.float32)
    assert_close(got, reference.norm(wide(x), wide(weight) + 1, None, 1e-5, "rms"), dtype)


@examples
@given(data=st.data(), dtype=dtypes, seed=seeds)
def test_rope_of_neighbours_in_a_slice(rig, data, dtype, seed):
    rng = np.random.default_rng(seed)
    rows, heads = data.draw(st.integers(0, rig.most(200, 9))), data.draw(st.integers(1, 4))
    half, first = data.draw(st.sampled_from([1, 4, 25, 32])), data.draw(st.integers(0, 17))
    x = normal(rng, (rows, heads, first + 2 * half + 3), dtype)
    angle, index = rng.random((50, half)) * 6, rng.integers(0, 50, rows).astype(np.int32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    here = slice(first, first + 2 * half)
    with rig.scope():
        device_x = rig.put(x)
        rig.kernels.rope(device_x[..., here], rig.put(cos), rig.put(sin), index, interleaved=True)
        got = rig.get(device_x)
    assert_close(got[..., here], rotated(x[..., here], cos, sin, index, True), dtype)
    got[..., here] = x[..., here]
    assert_same_bits(got, x)


@examples
@given(data=st.data(), cap=st.sampled_from([1e-3, 30.0, 1e5]), seed=seeds)
def test_softcap(rig, data, cap, seed):
    rng = np.random.default_rng(seed)
    shape = data.draw(st.integers(0, 20)), data.draw(st.integers(1, rig.most(5000, 90)))
    x = (rng.standard_normal(shape) * cap * 10.0 ** rng.integers(-3, 3, shape)).astype(np.float32)
    with rig.scope():
        device_x = rig.put(x)
        rig.kernels.softcap(device_x, cap)
        got = rig.get(device_x)
    assert_each_close(got, cap * np.tanh(wide(x) / cap), np.float32)


@examples
@given(data=st.data(), dtype=st.sampled_from(HALVES), decode=st.booleans(), seed=seeds)
def test_sinks(rig, data, dtype, decode, seed):
    rng = np.random.default_rng(seed)
    rows = data.draw(st.sampled_from([1, 3, rig.most(300, 40)]))
    keys, heads = rows + data.draw(st.integers(0, rig.most(2000, 90))), 3
    q, k, v = (normal(rng, (n, h, 32), dtype) for n, h in ((rows, heads), (keys, 1), (keys, 1)))
    sinks, positions = normal(rng, (heads,), dtype, 3.0), np.arange(keys)
    spec = AttentionSpec(np.zeros(heads, np.int32), 32**-0.5, True, decode=decode)
    with rig.scope():
        state = rig.new_state(rows, heads, 32)
        rig.kernels.start_state(state, rig.put(sinks))
        block = KvBlock(rig.put(k), rig.put(v), Layout((Range(0, 0, keys),)))
        layout = Layout((Range(0, keys - rows, rows),))
        rig.kernels.attend_block(rig.put(q), layout, block, state, spec)
        o, lse = rig.finish(state, dtype)
    want_o, want_lse = reference.attention(
        wide(q), wide(k), wide(v), positions[keys - rows :], positions,
        kv_head_of_q=[0] * heads, scale=32**-0.5, causal=True,
    )  # fmt: skip
    with_sinks = np.logaddexp(want_lse, wide(sinks))
    assert_lse_close(lse, with_sinks, dtype)
    assert_close(o, want_o * np.exp(want_lse - with_sinks)[..., None], dtype)


@examples
@given(data=st.data(), dtype=st.sampled_from(HALVES), seed=seeds)
def test_clamped_swiglu_of_experts(rig, data, dtype, seed):
    rng = np.random.default_rng(seed)
    counts = np.array(data.draw(st.lists(st.integers(0, rig.most(200, 9)), min_size=1, max_size=3)))
    width, hidden = (data.draw(st.integers(1, rig.most(300, 30))) for _ in range(2))
    x = normal(rng, (counts.sum(), width), dtype, 2.0)
    gate, up = (normal(rng, (len(counts), hidden, width), dtype, width**-0.5) for _ in range(2))
    down = normal(rng, (len(counts), width, hidden), dtype, hidden**-0.5)
    with rig.scope():
        packed = [rig.weight(weight) for weight in (up, down, gate)]
        weights = MlpWeights(
            packed[0], packed[1], "swiglu_clamped", gate=packed[2], limit=1.5, alpha=1.702
        )
        out = rig.empty(x.shape, dtype)
        rig.kernels.mlp(rig.put(x), weights, out, group_rows=counts)
        got = rig.get(out)
    want = np.empty(x.shape)
    for group, stop in enumerate(np.cumsum(counts)):
        rows = slice(stop - counts[group], stop)
        sums = [wide(x[rows]) @ wide(weight[group]).T for weight in (gate, up)]
        want[rows] = swiglu_clamped(*sums, 1.5, 1.702) @ wide(down[group]).T
    assert_close(got, want, dtype)


@examples
@given(
    data=st.data(), seed=seeds, score=st.sampled_from(["softmax", "sigmoid"]),
    biased=st.booleans(), group_score=st.sampled_from(["largest", "top2"]),
    renormalize=st.booleans(),
)  # fmt: skip
def test_choices_in_groups(rig, data, seed, score, biased, group_score, renormalize):
    rng = np.random.default_rng(seed)
    groups, size = data.draw(st.integers(1, 8)), data.draw(st.integers(2, rig.most(40, 9)))
    rows = data.draw(st.integers(0, rig.most(300, 9)))
    top_groups = data.draw(st.integers(1, groups))
    choices = data.draw(st.integers(1, min(top_groups * size, 8)))
    routing = Routing(
        score=score, choice_bias=biased, groups=groups, top_groups=top_groups,
        group_score=group_score, scale=2.5,
    )  # fmt: skip
    # Far enough apart for float32, and no two with sigmoids that add up to 1.
    logits = rng.permuted(np.tile(np.arange(groups * size) / 16, (rows, 1)), axis=1)
    logits = (logits - groups * size / 32 + 0.3).astype(np.float32)
    bias = rng.standard_normal(groups * size).astype(np.float32) if biased else None
    with rig.scope():
        experts, weights = (rig.empty((rows, choices), t) for t in (np.int32, np.float32))
        broken = rig.kernels.select_experts(
            rig.put(logits), experts, weights, renormalize=renormalize, routing=routing,
            choice_bias=None if bias is None else rig.put(bias),
        )  # fmt: skip
        got_experts, got_weights = rig.get(experts), rig.get(weights)
    want = plain_select(logits, choices, routing, bias, renormalize=renormalize)
    assert broken == -1
    np.testing.assert_array_equal(got_experts, want.experts)
    assert_each_close(got_weights, want.weights, np.float32)


@examples
@given(data=st.data(), dtype=dtypes, seed=seeds)
def test_gates_of_shared_experts(rig, data, dtype, seed):
    rng = np.random.default_rng(seed)
    n, columns = data.draw(st.integers(0, rig.most(300, 20))), data.draw(st.integers(1, 90))
    rows, base = normal(rng, (7, columns), dtype), normal(rng, (n, columns), dtype)
    inverse = rng.integers(-1, 7, (n, 2)).astype(np.int32)
    weights, gate = rng.random((n, 2), np.float32), normal(rng, (n, 1), np.float32, 3.0)
    with rig.scope():
        out = rig.put(base)
        rig.kernels.combine_rows(
            rig.put(rows), rig.put(inverse), rig.put(weights), out, out, base_gate=rig.put(gate)
        )
        got = rig.get(out)
    taken = np.where(inverse[..., None] >= 0, wide(rows)[inverse], 0.0)
    want = (wide(weights)[..., None] * taken).sum(axis=1) + wide(base) / (1 + np.exp(-wide(gate)))
    assert_close(got, want, dtype)
