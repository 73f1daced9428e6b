"""Few query rows read keys and values where they are; the bits are those of many rows."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa.verify import reference
from support.compare import assert_close, assert_same_bits, normal

MANY = 120  # query rows that are packed for, whatever the dtype


def draw(rng, dtype, sizes):
    """Return q `[MANY, heads, head_dim]`, k and v of `keys` rows, each a slice of a wider array."""
    keys, heads, kv_heads, head_dim, v_head_dim = sizes
    q = normal(rng, (MANY, heads + 1, head_dim + 3), dtype, 1.5)[:, 1:, 2:-1]
    k = normal(rng, (keys, kv_heads + 2, head_dim + 5), dtype, 1.5)[:, 1:-1, :-5]
    v = normal(rng, (keys, kv_heads, v_head_dim + 1), dtype)[:, :, 1:]
    return q, k, v


@pytest.fixture
def attend(kernels):
    """Return a function that gives the state after rows [first, last) of a sequence."""

    def run(q, k, v, first, last, *, q_start, k_start=0, **options):
        state = kernels.new_state(last - first, q.shape[1], v.shape[2])
        q_ranges, k_ranges = [(0, q_start + first, last - first)], [(0, k_start, len(k))]
        kernels.attend(q[first:last], k, v, state, q_ranges=q_ranges, k_ranges=k_ranges, **options)
        return state

    return run


def same_rows(some, whole, first, last):
    for a, b in zip(some, whole, strict=True):
        assert a.tobytes() == np.ascontiguousarray(b[first:last]).tobytes()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    keys=st.integers(1, 1700),
    kv_head_of_q=st.sampled_from([[0], [0, 0, 1], [1, 0, 1], [2, 2, 0, 2, 0]]),
    dims=st.sampled_from([(1, 1), (24, 37), (64, 64), (33, 130), (128, 128), (200, 96)]),
    position=st.integers(0, 1700),
    k_start=st.sampled_from([0, 0, 1, 300, 511]),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 90, 600]),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_few_rows_have_the_bits_of_many(
    attend, dtype, keys, kv_head_of_q, dims, position, k_start, causal, window, softcap,
    threads, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    q, k, v = draw(rng, dtype, (keys, len(kv_head_of_q), max(kv_head_of_q) + 1, *dims))
    options = {
        "q_start": position, "k_start": k_start, "kv_head_of_q": kv_head_of_q, "causal": causal,
        "window": window, "softcap": softcap,
    }  # fmt: skip
    whole = attend(q, k, v, 0, MANY, **options)
    for rows in (1, 2, 3, 7):
        first = int(rng.integers(0, MANY - rows))
        some = attend(q, k, v, first, first + rows, threads=threads, **options)
        same_rows(some, whole, first, first + rows)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_wide_heads_and_many_keys(attend, rng, dtype, threads):
    q, k, v = draw(rng, dtype, (5000, 2, 1, 512, 512))
    whole = attend(q, k, v, 0, MANY, q_start=4880)
    some = attend(q, k, v, MANY - 1, MANY, q_start=4880, threads=threads)
    same_rows(some, whole, MANY - 1, MANY)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_head_that_nobody_needs_and_more_heads_than_fit(attend, rng, dtype, threads):
    kv_head_of_q = [head for head in range(41) for _ in range(4) if head != 7]
    q, k, v = draw(rng, dtype, (700, len(kv_head_of_q), 41, 16, 16))
    options = {"q_start": 600, "kv_head_of_q": kv_head_of_q}
    whole = attend(q, k, v, 0, MANY, **options)
    same_rows(attend(q, k, v, 50, 51, threads=threads, **options), whole, 50, 51)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("sequences", [1, 3, 11])
def test_sequences_decode_side_by_side(kernels, rng, dtype, sequences, threads):
    """One row each, one of them with many, some with no keys and one with no row."""
    lengths = [(i * 397) % 1300 for i in range(sequences)]
    rows = [MANY if i == 1 else 0 if i == 2 else 1 for i in range(sequences)]
    q = normal(rng, (sum(rows), 4, 40), dtype, 1.5)
    k, v = (normal(rng, (sum(lengths), 2, 40), dtype) for _ in range(2))
    starts = [max(length - count, 0) for length, count in zip(lengths, rows, strict=True)]
    q_ranges = list(zip(range(sequences), starts, rows, strict=True))
    k_ranges = [(i, 0, length) for i, length in enumerate(lengths)]
    together = kernels.new_state(len(q), 4, 40)
    kernels.attend(q, k, v, together, q_ranges=q_ranges, k_ranges=k_ranges, threads=threads)
    alone = kernels.new_state(len(q), 4, 40)
    row = key = 0
    for q_range, k_range in zip(q_ranges, k_ranges, strict=True):
        mine, keys = slice(row, row + q_range[2]), slice(key, key + k_range[2])
        state = tuple(part[mine] for part in alone)
        kernels.attend(q[mine], k[keys], v[keys], state, q_ranges=[q_range], k_ranges=[k_range])
        row, key = mine.stop, keys.stop
    for a, b in zip(together, alone, strict=True):
        assert_same_bits(a, b)


def test_keys_that_come_block_by_block(kernels, rng, dtype):
    """A carried state after each block of a cache equals one call over all of it."""
    q, k, v = draw(rng, dtype, (1600, 3, 3, 48, 48))
    q_ranges = [(0, 1599, 1)]
    whole, carried = kernels.new_state(1, 3, 48), kernels.new_state(1, 3, 48)
    kernels.attend(q[:1], k, v, whole, q_ranges=q_ranges, k_ranges=[(0, 0, 1600)])
    for first, last in ((0, 512), (512, 1024), (1024, 1600)):
        kernels.attend(
            q[:1],
            k[first:last],
            v[first:last],
            carried,
            q_ranges=q_ranges,
            k_ranges=[(0, first, last - first)],
            threads=2,
        )
    for a, b in zip(carried, whole, strict=True):
        assert_same_bits(a, b)


def test_values_against_float64(kernels, rng, dtype):
    q, k, v = draw(rng, dtype, (3000, 4, 2, 64, 64))
    kv_head_of_q, scale = [0, 0, 1, 1], 0.125
    o, _ = kernels.attention(
        np.ascontiguousarray(q[:1]), k, v, q_ranges=[(0, 2999, 1)], kv_head_of_q=kv_head_of_q,
        scale=scale, threads=2,
    )  # fmt: skip
    wide = [a.astype(np.float64) for a in (q[:1], k, v)]
    want, _ = reference.attention(
        *wide,
        np.array([2999]),
        np.arange(3000),
        kv_head_of_q=kv_head_of_q,
        scale=scale,
        causal=True,
    )
    assert_close(o, want, dtype)
