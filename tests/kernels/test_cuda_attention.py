"""Attention on a GPU, emulated: decoding, calls of many launches, and what is refused.

The tests of attention, its bits and its tiles run over these kernels as well.
"""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa.spec import DTYPES
from pympa.verify import reference
from support.compare import assert_close, assert_lse_close, normal
from support.lanes import FULL

A100, H100 = 163 * 1024, 227 * 1024  # shared memory of a block, in bytes


@pytest.fixture(scope="module")
def kernels(cuda_kernels):
    return cuda_kernels


@pytest.fixture(params=["float16", "bfloat16"])
def dtype(request):
    return DTYPES[request.param]


def draw(rng, dtype, rows, keys, heads=1, kv_heads=1, head_dim=32, v_head_dim=None):
    return (
        normal(rng, (rows, heads, head_dim), dtype, 1.5),
        normal(rng, (keys, kv_heads, head_dim), dtype, 1.5),
        normal(rng, (keys, kv_heads, v_head_dim or head_dim), dtype),
    )


@pytest.fixture
def attend(kernels):
    """Return a function that gives the state of q at its positions after k and v."""

    def run(q, k, v, q_start, k_start=0, state=None, **options):
        state = state or kernels.new_state(len(q), q.shape[1], v.shape[2])
        q_ranges, k_ranges = [(0, q_start, len(q))], [(0, k_start, len(k))]
        kernels.attend(q, k, v, state, q_ranges=q_ranges, k_ranges=k_ranges, **options)
        return state

    return run


def same(some, whole, rows=slice(None)):
    for a, b in zip(some, whole, strict=True):
        assert a.tobytes() == np.ascontiguousarray(b[rows]).tobytes()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 9),
    keys=st.integers(1, 1300),
    kv_head_of_q=st.sampled_from([[0], [0, 0, 1], [1, 0, 1], [2, 2, 0, 2, 0]]),
    # Not one column of v: a sum of many that nearly vanishes has no relative error to speak of.
    dims=st.sampled_from([(1, 7), (24, 37), (64, 64), (33, 130), (128, 128), (40, 300)]),
    ahead=st.integers(0, 600),
    k_start=st.sampled_from([0, 0, 1, 300, 511]),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 90, 600]),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_decoding(
    attend, kernels, dtype, rows, keys, kv_head_of_q, dims, ahead, k_start, causal,
    window, softcap, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    sizes = (rows, keys, len(kv_head_of_q), max(kv_head_of_q) + 1, *dims)
    q, k, v = draw(rng, dtype, *sizes)
    start = max(k_start + keys - rows - ahead, 0)
    options = {"kv_head_of_q": kv_head_of_q, "causal": causal, "window": window}
    how = options | {"softcap": softcap, "decode": True}
    state = attend(q, k, v, start, k_start, **how)
    o, lse = kernels.finish(state, dtype)
    want, want_lse = reference.attention(
        *(x.astype(np.float64) for x in (q, k, v)),
        start + np.arange(rows),
        k_start + np.arange(keys),
        scale=dims[0] ** -0.5,
        softcap=softcap or None,
        **options | {"window": window or None},
    )
    assert_close(o, want, dtype)
    assert_lse_close(lse, want_lse, dtype)
    row = int(rng.integers(0, rows))
    same(attend(q[row : row + 1], k, v, start + row, k_start, **how), state, slice(row, row + 1))


@FULL
@pytest.mark.parametrize("decode", [False, True])
def test_keys_cut_between_tiles(attend, dtype, rng, decode):
    q, k, v = draw(rng, dtype, 3, 1500, 4, 2, 40, 72)
    whole = attend(q, k, v, 1490, decode=decode)
    cuts = [0, 512, 1024, 1500] if decode else [0, 64, 128, 1024, 1500]
    state = None
    for first, last in itertools.pairwise(cuts):
        state = attend(q, k[first:last], v[first:last], 1490, first, state, decode=decode)
    same(state, whole)


@FULL
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(("sequences", "heads"), [(70, 1), (1, 131)])
def test_calls_of_many_launches(kernels, rng, sequences, heads, decode):
    """The parameters of one launch hold 64 ranges and 128 heads."""
    q, k, v = draw(rng, np.float16, sequences, 3 * sequences, heads, 2, 16)
    kv_head_of_q = np.arange(heads) % 2
    state = kernels.new_state(sequences, heads, 16)
    q_ranges = [(i, 2, 1) for i in range(sequences)]
    k_ranges = [(i, j, 1) for i in range(sequences) for j in range(3)]
    kernels.attend(
        q, k, v, state, q_ranges=q_ranges, k_ranges=k_ranges, kv_head_of_q=kv_head_of_q,
        decode=decode,
    )  # fmt: skip
    for i, head in {(0, 0), (sequences // 2, heads // 2), (sequences - 1, heads - 1)}:
        row, keys, heads_of_one = slice(i, i + 1), slice(3 * i, 3 * i + 3), slice(head, head + 1)
        alone = kernels.new_state(1, 1, 16)
        kernels.attend(
            q[row, heads_of_one], k[keys], v[keys], alone, q_ranges=[(0, 2, 1)],
            k_ranges=[(0, j, 1) for j in range(3)], kv_head_of_q=[head % 2], decode=decode,
        )  # fmt: skip
        same(alone, state, (row, heads_of_one))


@FULL
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(512, 512), (512, 64), (40, 512)])
def test_less_shared_memory_changes_no_bits(kernels, attend, rng, head_dim, v_head_dim):
    q, k, v = draw(rng, np.float16, 70, 200, 1, 1, head_dim, v_head_dim)
    whole = attend(q, k, v, 130)
    kernels.core.set_shared_memory(A100)
    try:
        same(attend(q, k, v, 130), whole)
    finally:
        kernels.core.set_shared_memory(H100)


def test_a_fresh_state_is_not_read(kernels, attend, dtype, rng):
    q, k, v = draw(rng, dtype, 20, 90, 1, 1, 16)
    for decode in (False, True):
        state = kernels.new_state(20, 1, 16)
        state[2][:] = np.nan
        kernels.core.start_state(*state, None, kernels.on())
        same(attend(q, k, v, 70, state=state, decode=decode), attend(q, k, v, 70, decode=decode))
        unseen = kernels.new_state(20, 1, 16)
        unseen[2][:] = np.nan
        kernels.core.start_state(*unseen, None, kernels.on())
        o, lse = kernels.finish(unseen, dtype)
        assert not o.any()
        assert (lse == -np.inf).all()
        kernels.core.merge(*unseen, *state, kernels.on())
        same(unseen, state)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "message"),
    [(577, 8, "head_dim: expected at most 576"), (8, 513, "v_head_dim: expected at most 512")],
)
def test_wider_heads_are_refused(attend, rng, head_dim, v_head_dim, message):
    q, k, v = draw(rng, np.float16, 1, 1, 1, 1, head_dim, v_head_dim)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, 0)


def test_float32_is_refused(attend, rng):
    with pytest.raises(ValueError, match="expected dtype float16 or bfloat16, got float32"):
        attend(*draw(rng, np.float32, 1, 1), 0)


def test_more_rows_than_decoding_takes_are_refused(kernels, attend, rng):
    rows = 16 * 65535 + 1
    q, k, v = draw(rng, np.float16, 1, 1, head_dim=8)
    with pytest.raises(ValueError, match=f"q_ranges: .* at most {rows - 1} pairs .* got {rows}"):
        attend(np.broadcast_to(q, (rows, 1, 8)), k, v, 0, decode=True)
    ranges = [np.array([r], np.int64) for r in [(0, 2**21, 10**6), (0, 0, 2**21, 0)]]
    with pytest.raises(ValueError, match=r"partial states .* got 4096000000"):
        kernels.core.range_workspace_bytes(1, 1, 8, 8, "bfloat16", *ranges, True, kernels.on())
