"""Attention: values against float64 and torch, masks, states, and NaN."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa.spec import LEAST_SOFTCAP, MOST_SOFTCAP
from pympa.verify import reference
from support.compare import assert_close, assert_lse_close, assert_same_bits, normal, wide


@pytest.fixture
def kernels(attention_kernels):
    return attention_kernels


def draw(rng, dtype, rows, keys, heads=1, kv_heads=1, head_dim=32, v_head_dim=None):
    return (
        normal(rng, (rows, heads, head_dim), dtype, 1.5),
        normal(rng, (keys, kv_heads, head_dim), dtype, 1.5),
        normal(rng, (keys, kv_heads, v_head_dim or head_dim), dtype),
    )


def oracle(q, k, v, *, q_start=0, k_start=0, kv_head_of_q=None, scale=None, **options):
    heads = q.shape[1]
    if kv_head_of_q is None:
        kv_head_of_q = np.arange(heads) * k.shape[1] // heads
    return reference.attention(
        wide(q),
        wide(k),
        wide(v),
        q_start + np.arange(len(q)),
        k_start + np.arange(len(k)),
        kv_head_of_q=list(kv_head_of_q),
        scale=q.shape[2] ** -0.5 if scale is None else scale,
        **options,
    )


@pytest.mark.parametrize(
    ("rows", "keys", "head_dim", "v_head_dim"),
    [
        (1, 1, 1, 1),
        (1, 700, 64, 64),
        (130, 130, 40, 40),
        (77, 1100, 100, 24),
        (300, 300, 16, 70),
        (20, 600, 33, 35),
        (9, 520, 512, 576),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_matches_the_formula(kernels, dtype, rng, rows, keys, head_dim, v_head_dim, causal):
    if kernels.isa == "cuda" and v_head_dim > 512:
        pytest.skip("heads of a GPU are at most 512 wide")
    q, k, v = draw(rng, dtype, rows, keys, 2, 1, head_dim, v_head_dim)
    start = keys - rows
    o, lse = kernels.attention(q, k, v, q_ranges=[(0, start, rows)], causal=causal)
    want_o, want_lse = oracle(q, k, v, q_start=start, causal=causal)
    assert_close(o, want_o, dtype)
    assert_lse_close(lse, want_lse, dtype)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [1, 3, 100, 513])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_and_softcap(kernels, dtype, rng, softcap, window, causal):
    q, k, v = draw(rng, dtype, 230, 1200, 1, 1, 48)
    o, _ = kernels.attention(
        q, k, v, q_ranges=[(0, 700, 230)], causal=causal, window=window, softcap=softcap
    )
    want, _ = oracle(q, k, v, q_start=700, causal=causal, window=window, softcap=softcap or None)
    assert_close(o, want, dtype)


@pytest.mark.parametrize("softcap", [LEAST_SOFTCAP, 1e-3, 1.0, 300.0, MOST_SOFTCAP])
def test_softcaps_of_any_size(kernels, dtype, rng, softcap):
    """The least one makes all scores alike, the largest one leaves them as they are."""
    q, k, v = draw(rng, dtype, 40, 90, 1, 1, 48)
    options = {"scale": 0.5, "causal": True}  # scores up to 30
    for decode in (False, True):
        o, _ = kernels.attention(
            q, k, v, q_ranges=[(0, 50, 40)], softcap=softcap, decode=decode, **options
        )
        assert_close(o, oracle(q, k, v, q_start=50, softcap=softcap, **options)[0], dtype)
    uncapped, _ = oracle(q, k, v, q_start=50, **options)
    if softcap == MOST_SOFTCAP:
        assert_close(o, uncapped, dtype)


@pytest.mark.parametrize(
    "kv_head_of_q", [[0, 0, 0, 1, 2], [2, 0, 2, 1, 2], [1] * 5, [0, 2, 0, 2, 0]]
)
def test_uneven_head_maps(kernels, dtype, rng, kv_head_of_q):
    q, k, v = draw(rng, dtype, 65, 90, 5, 3, 24, 16)
    options = {"kv_head_of_q": kv_head_of_q, "causal": True}
    o, _ = kernels.attention(q, k, v, q_ranges=[(0, 25, 65)], **options)
    want, _ = oracle(q, k, v, q_start=25, **options)
    assert_close(o, want, dtype)


def test_more_heads_than_a_block_holds(best_kernels, rng):
    q, k, v = draw(rng, np.float32, 3, 40, 130, 1, 8)
    o, _ = best_kernels.attention(q, k, v, q_ranges=[(0, 37, 3)])
    assert_close(o, oracle(q, k, v, q_start=37)[0], np.float32)


def test_sequences_in_odd_order(kernels, dtype, rng):
    # Two sequences; q ranges and k ranges are listed and packed in unlike orders.
    lengths = {7: 400, 2: 650}
    parts = {name: draw(rng, dtype, length, length, 2, 2, 20) for name, length in lengths.items()}
    q_ranges = [(7, 250, 150), (2, 600, 50), (7, 0, 0), (2, 0, 31), (9, 5, 2), (7, 3, 8)]
    k_ranges = [(2, 512, 138), (7, 0, 400), (2, 0, 512)]

    def gather(which, ranges):
        missing = np.ones((2, 2, 20), dtype)  # sequence 9 has queries but no keys
        return np.concatenate(
            [
                parts[name][which][start : start + length] if name in parts else missing
                for name, start, length in ranges
            ]
        )

    q = gather(0, q_ranges)
    k, v = gather(1, k_ranges), gather(2, k_ranges)
    for threads in (1, 3):
        o, lse = kernels.attention(q, k, v, q_ranges=q_ranges, k_ranges=k_ranges, threads=threads)
        row = 0
        for name, start, length in q_ranges:
            if name in parts:
                part_q, part_k, part_v = parts[name]
                want, _ = oracle(part_q[start : start + length], part_k, part_v, q_start=start)
                assert_close(o[row : row + length], want, dtype)
            else:
                assert not o[row : row + length].any()
                assert (lse[row : row + length] == -np.inf).all()
            row += length


def test_strided_heads(kernels, dtype, rng):
    fused = normal(rng, (90, 5, 40), dtype)
    q, k, v = fused[:, :3], fused[:, 3:4], fused[:, 4:5]
    plain, _ = kernels.attention(*(np.ascontiguousarray(a) for a in (q, k, v)))
    strided, _ = kernels.attention(q, k, v)
    assert_same_bits(strided, plain)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 150),
    keys=st.integers(0, 1300),
    start=st.integers(0, 900),
    k_start=st.integers(0, 900),
    head_dim=st.integers(1, 70),
    v_head_dim=st.integers(1, 70),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 40, 600]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    kernels, dtype, rows, keys, start, k_start, head_dim, v_head_dim, causal,
    window, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    q, k, v = draw(rng, dtype, rows, keys, 3, 2, head_dim, v_head_dim)
    o, lse = kernels.attention(
        q, k, v, q_ranges=[(0, start, rows)], k_ranges=[(0, k_start, keys)], causal=causal,
        window=window,
    )  # fmt: skip
    want, want_lse = oracle(
        q, k, v, q_start=start, k_start=k_start, causal=causal, window=window or None
    )
    assert_close(o, want, dtype)
    masked = want_lse == -np.inf
    assert (lse[masked] == -np.inf).all()
    assert (o[masked] == 0).all()


def test_sharp_scores(kernels, dtype, rng):
    # Scores of +-1,000s: one key wins, and naive exponentials would overflow. Whole numbers, as
    # sums of others of that size are off by 1e-4 in float32, and so is all that follows.
    _, _, v = draw(rng, dtype, 70, 600, 1, 1, 64)
    q, k = (rng.integers(-3, 4, (n, 1, 64)).astype(dtype) for n in (70, 600))
    o, lse = kernels.attention(q, k, v, causal=False, scale=10.0)
    want, want_lse = oracle(q, k, v, causal=False, scale=10.0)
    assert want_lse.min() > 500
    assert_lse_close(lse, want_lse, dtype)
    assert_close(o, want, dtype)


def test_long_sums(best_kernels, dtype, rng):
    q, k, v = draw(rng, dtype, 64, 4096, 2, 1, 128)
    o, _ = best_kernels.attention(q, k, v, q_ranges=[(0, 4032, 64)])
    assert_close(o, oracle(q, k, v, q_start=4032)[0], dtype)


def test_carried_state_and_merge(kernels, dtype, rng):
    q, k, v = draw(rng, dtype, 60, 900, 2, 2, 36, 20)
    cuts = [0, 130, 130, 700, 900]
    carried = kernels.new_state(60, 2, 20)
    merged = kernels.new_state(60, 2, 20)
    for first, last in itertools.pairwise(cuts):
        options = {"q_ranges": [(0, 840, 60)], "k_ranges": [(0, first, last - first)]}
        kernels.attend(q, k[first:last], v[first:last], carried, **options)
        alone = kernels.new_state(60, 2, 20)
        kernels.attend(q, k[first:last], v[first:last], alone, **options)
        kernels.core.merge(*merged, *alone, kernels.on(2))
    want, _ = oracle(q, k, v, q_start=840)
    assert_close(kernels.finish(carried, dtype)[0], want, dtype)
    assert_close(kernels.finish(merged, dtype, threads=3)[0], want, dtype)


def test_merge_of_nothing(kernels):
    empty, other = kernels.new_state(2, 1, 3), kernels.new_state(2, 1, 3)
    kernels.core.merge(*empty, *other, kernels.on(1))
    o, lse = kernels.finish(empty, np.float32)
    assert (o == 0).all()
    assert (lse == -np.inf).all()
    other[0][:], other[1][:], other[2][:] = 3.0, 2.0, 4.0
    kernels.core.merge(*empty, *other, kernels.on(1))
    o, lse = kernels.finish(empty, np.float32)
    assert (o == 2).all()
    assert_lse_close(lse, np.full((2, 1), 3 + np.log(2)), np.float32)


def test_no_keys_and_no_rows(kernels, dtype):
    q, k, v = np.ones((4, 2, 8), dtype), np.ones((0, 1, 8), dtype), np.ones((0, 1, 5), dtype)
    o, lse = kernels.attention(q, k, v)
    assert o.shape == (4, 2, 5)
    assert (o == 0).all()
    assert (lse == -np.inf).all()
    o, lse = kernels.attention(q[:0], np.ones((3, 1, 8), dtype), np.ones((3, 1, 5), dtype))
    assert o.shape == (0, 2, 5)


def test_future_keys_are_fully_masked(kernels, dtype, rng):
    q, k, v = draw(rng, dtype, 50, 80)
    o, lse = kernels.attention(q, k, v, k_ranges=[(0, 50, 80)])
    assert (o == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_nan_propagates(kernels, dtype, rng, where, softcap):
    q, k, v = draw(rng, dtype, 100, 100)
    {"q": q, "k": k, "v": v}[where][40, 0, 3] = np.nan
    o, lse = kernels.attention(q, k, v, softcap=softcap)
    broken = np.isnan(o.astype(np.float32)[:, 0])
    if where == "q":
        assert broken[40].all()
        assert np.isnan(lse[40]).all()
        assert not np.delete(broken, 40, axis=0).any()
    elif where == "k":
        assert broken[40:].all()
        assert np.isnan(lse[40:]).all()
        assert not broken[:40].any()
    else:
        assert broken[40:, 3].all()
        assert not np.isnan(lse).any()


def test_nan_survives_a_merge(kernels):
    good, bad = kernels.new_state(1, 1, 4), kernels.new_state(1, 1, 4)
    good[0][:], good[1][:], good[2][:] = 1.0, 1.0, 1.0
    bad[1][:], bad[2][:] = np.nan, np.nan
    kernels.core.merge(*good, *bad, kernels.on(1))
    o, lse = kernels.finish(good, np.float32)
    assert np.isnan(o).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("causal", [True, False])
def test_against_torch(kernels, dtype, rng, causal):
    torch = pytest.importorskip("torch", reason="torch is the second opinion on attention")
    q, k, v = draw(rng, dtype, 200, 200, 4, 4, 72)
    tensors = [torch.tensor(wide(a)).permute(1, 0, 2)[None] for a in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
    o, _ = kernels.attention(q, k, v, causal=causal)
    assert_close(o, want[0].permute(1, 0, 2).numpy(), dtype)
