"""What a query row does not see never reaches it, NaN and infinity in V neither.

A product of probabilities with values that reads what some row does not see multiplies by zero, and
zero times NaN is NaN. So each output element is held against a plain loop over the keys that its
row sees; where none of these is broken, it has the bits of the same call with 0 in their place.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.compare import assert_close, assert_same_bits, normal

WAYS = ("whole", "decode", "blocks", "merged", "tiles")


@pytest.fixture
def kernels(attention_kernels):
    return attention_kernels


def sees(position, keys, *, causal, window):
    """Return which of the positions `keys` a query at `position` sees."""
    seen = keys <= position if causal else np.ones(len(keys), bool)
    return seen & (np.abs(keys - position) < window) if window else seen


def by_loop(q, k, v, *, q_start, k_start, kv_head_of_q, **rule):
    """Return o in float64, row by row over the keys that it sees, and where it sees broken ones."""
    o = np.zeros((*q.shape[:2], v.shape[2]))
    broken = np.zeros(o.shape, bool)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    for row in range(len(q)):
        seen = sees(q_start + row, k_start + np.arange(len(k)), **rule)
        if not seen.any():
            continue
        for head, kv_head in enumerate(kv_head_of_q):
            scores = k[seen, kv_head] @ q[row, head] * q.shape[2] ** -0.5
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            values = v[seen, kv_head]
            broken[row, head] = ~np.isfinite(values).all(axis=0)
            with np.errstate(invalid="ignore"):
                o[row, head] = (weights[:, None] * values).sum(axis=0)
    return o, broken


def attend(kernels, way, q, k, v, *, q_start, k_start, kv_head_of_q, threads, **rule):
    """Return o and lse by one of the ways in which keys are folded into a state."""
    options = {"kv_head_of_q": kv_head_of_q, "threads": threads, **rule}
    state = kernels.new_state(len(q), q.shape[1], v.shape[2])

    def fold(state, first, last, **more):
        ranges = {
            "q_ranges": [(0, q_start, len(q))],
            "k_ranges": [(0, k_start + first, last - first)],
        }
        kernels.attend(q, k[first:last], v[first:last], state, **ranges, **options, **more)

    cut = min(len(k), 512 - k_start % 512 if way == "tiles" else 64 - k_start % 64)
    if way == "tiles":
        scale = q.shape[2] ** -0.5
        for first, last in (
            (0, cut),
            *((i, min(i + 512, len(k))) for i in range(cut, len(k), 512)),
        ):
            scores = kernels.score_tile(q, k[first:last], kv_head_of_q, threads=threads)
            kernels.fold_tile(
                scores, v[first:last], state, q_start=q_start, k_start=k_start + first, scale=scale,
                **options,
            )  # fmt: skip
    elif way == "blocks":
        fold(state, 0, cut)
        fold(state, cut, len(k))
    elif way == "merged":
        other = kernels.new_state(len(q), q.shape[1], v.shape[2])
        fold(state, cut, len(k))
        fold(other, 0, cut)
        kernels.core.merge(*state, *other, kernels.on(threads))
    else:
        fold(state, 0, len(k), decode=way == "decode")
    return kernels.finish(state, q.dtype)


def compare(kernels, way, q, k, v, **call):
    want, broken = by_loop(q, k, v, **{name: call[name] for name in call if name != "threads"})
    o, lse = attend(kernels, way, q, k, v, **call)
    zeroed = np.where(np.isfinite(v), v, np.zeros_like(v))
    plain_o, plain_lse = attend(kernels, way, q, k, zeroed, **call)
    assert_same_bits(lse, plain_lse)
    assert_same_bits(o[~broken], plain_o[~broken])
    assert_close(np.where(broken, 0, o), np.where(broken, 0, want), q.dtype)
    # NaN, or the infinity of its sign.
    np.testing.assert_array_equal(o[broken].astype(np.float64), want[broken])


def draw(rng, dtype, rows, keys, heads, kv_heads, head_dim, v_head_dim, share):
    """Return q, k and v with NaN and infinities in `share` of its rows of a head, or one element.

    Scores are small, so that no probability is rounded to zero.
    """
    q = normal(rng, (rows, heads, head_dim), dtype, 0.7)
    k = normal(rng, (keys, kv_heads, head_dim), dtype, 0.7)
    v = normal(rng, (keys, kv_heads, v_head_dim), dtype)
    for _ in range(max(int(share * keys), 1)):
        key, head = rng.integers(keys), rng.integers(kv_heads)
        columns = slice(None) if rng.random() < 0.5 else rng.integers(v_head_dim)
        v[key, head, columns] = rng.choice([np.nan, np.inf, -np.inf])
    return q, k, v


def test_the_last_of_two_rows(kernels, dtype):
    ones = np.ones((2, 1, 16), dtype)
    v = ones.copy()
    v[1] = np.nan
    for decode in (False, True):
        o, _ = kernels.attention(ones, ones, v, decode=decode)
        assert (o[0] == 1).all()
        assert np.isnan(o[1]).all()


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("at", [0, 31, 63])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_key_of_64(kernels, dtype, rng, window, at, value):
    """A NaN reaches the rows that see it and leaves with the window."""
    q = k = np.ones((64, 1, 16), dtype)
    v = rng.standard_normal((64, 1, 16)).astype(dtype)
    v[at] = value
    o, _ = kernels.attention(q, k, v, window=window)
    reached = np.arange(64) >= at
    if window:
        reached &= np.arange(64) < at + window
    assert (np.isfinite(o.astype(np.float32)).all(axis=(1, 2)) == ~reached).all()
    np.testing.assert_array_equal(o[reached].astype(np.float64), value)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    way=st.sampled_from(WAYS),
    rows=st.sampled_from([1, 2, 5, 8, 9, 33, 110]),
    keys=st.integers(1, 700),
    ahead=st.integers(-20, 150),
    k_start=st.sampled_from([0, 0, 1, 300, 511]),
    kv_head_of_q=st.sampled_from([[0], [0, 0, 1], [1, 0, 1], [2, 2, 0, 2, 0]]),
    # Not one column of v: a sum of many that nearly vanishes has no relative error to speak of.
    dims=st.sampled_from([(1, 7), (24, 37), (33, 66), (128, 128), (40, 200)]),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 3, 90, 600]),
    share=st.sampled_from([0.0, 0.02, 0.3]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_depend_on_what_they_see(
    kernels, dtype, way, rows, keys, ahead, k_start, kv_head_of_q, dims,
    causal, window, share, threads, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    sizes = (rows, keys, len(kv_head_of_q), max(kv_head_of_q) + 1, *dims)
    q, k, v = draw(rng, dtype, *sizes, share)
    compare(
        kernels, way, q, k, v, q_start=max(k_start + keys - rows - ahead, 0),
        k_start=k_start, kv_head_of_q=kv_head_of_q, causal=causal, window=window, threads=threads,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("way", WAYS)
def test_broken_keys_stay_hidden_too(kernels, dtype, rng, way, rows):
    q, k, v = draw(rng, dtype, rows, 150, 2, 1, 24, 40, 0)
    v = np.where(np.isfinite(v), v, np.zeros_like(v))
    call = {
        "q_start": 40, "k_start": 0, "kv_head_of_q": [0, 0], "threads": 1, "causal": True,
        "window": 50,
    }  # fmt: skip
    plain, plain_lse = attend(kernels, way, q, k, v, **call)
    broken = np.array([20, 41, 90])
    k[broken] = np.array([np.nan, np.inf, -np.inf])[:, None, None]
    o, lse = attend(kernels, way, q, k, v, **call)
    positions = 40 + np.arange(rows)
    seen = np.array([sees(at, broken, causal=True, window=50).any() for at in positions])
    assert_same_bits(o[~seen], plain[~seen])
    assert_same_bits(lse[~seen], plain_lse[~seen])


@pytest.mark.parametrize("dims", [(64, 512), (300, 70)])
def test_wide_heads(kernels, dtype, rng, dims):
    """Warps of a GPU share rows here."""
    q, k, v = draw(rng, dtype, 70, 130, 2, 1, *dims, 0.05)
    rule = {"causal": True, "window": 40}
    for way in WAYS:
        compare(
            kernels, way, q, k, v, q_start=60, k_start=0, kv_head_of_q=[0, 0],
            threads=1, **rule,
        )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
def test_sequences_of_a_batch(kernels, dtype, rng, threads):
    """A sequence's broken keys are its own, whatever the lengths beside it."""
    lengths = [1, 40, 3, 130, 7]
    rows = sum(lengths)
    q, k, v = draw(rng, dtype, rows, rows, 3, 3, 16, 24, 0)
    v = np.where(np.isfinite(v), v, np.zeros_like(v))
    ranges = [(i, 0, length) for i, length in enumerate(lengths)]
    options = {"q_ranges": ranges, "k_ranges": ranges, "threads": threads}
    plain, _ = kernels.attention(q, k, v, **options)
    starts = np.cumsum([0, *lengths])
    for start, length in zip(starts[:-1], lengths, strict=True):
        v[start + length - 1] = np.nan  # of each, the last
    o, _ = kernels.attention(q, k, v, **options)
    last = np.isin(np.arange(rows), starts[1:] - 1)
    assert np.isnan(o[last]).all()
    assert_same_bits(o[~last], plain[~last])
