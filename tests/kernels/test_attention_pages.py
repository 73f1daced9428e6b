"""Keys and values in pages: anywhere in their arrays, with the bits of keys one after the other."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa.kernels import AttentionSpec, KvBlock
from pympa.plan.layout import Layout, Range
from pympa.spec import DTYPES
from pympa.verify import reference
from support.compare import HALVES, assert_close, assert_lse_close, assert_same_bits, normal, wide

PAGE = 512


def draw(rng, dtype, rows, keys, heads=2, kv_heads=1, head_dim=24, v_head_dim=37):
    """Return q, k and v."""
    q = normal(rng, (rows, heads, head_dim), dtype)
    k = normal(rng, (keys, kv_heads, head_dim), dtype)
    return q, k, normal(rng, (keys, kv_heads, v_head_dim), dtype)


def in_pages(rng, array, lengths, order):
    """Return the array's rows in pages of some lengths, in another order, with NaN between them.

    Also the first row of each page.
    """
    pages = np.split(array, np.cumsum(lengths)[:-1])
    pool, first = [], [0] * len(pages)
    gap, row = np.full((3, *array.shape[1:]), np.nan, array.dtype), 0
    for number in order:
        pool += [gap, pages[number]]
        first[number] = row + len(gap)
        row = first[number] + len(pages[number])
    return np.concatenate(pool), first


def page_ranges(lengths, first_rows, start=0):
    """Return the key ranges of pages that follow each other from a position on."""
    starts = start + np.cumsum([0, *lengths[:-1]])
    return [(0, *page) for page in zip(starts.tolist(), lengths, first_rows, strict=True)]


def both_ways(kernels, rng, q, k, v, lengths, *, q_start, start=0, **options):
    """Return the states of one call over keys in one piece, and over pages of them."""
    order = rng.permutation(len(lengths))
    paged_k, first_rows = in_pages(rng, k, lengths, order)
    paged_v, _ = in_pages(rng, v, lengths, order)
    options["q_ranges"] = [(0, q_start, len(q))]
    found = []
    for keys, values, k_ranges in (
        (k, v, [(0, start, len(k))]),
        (paged_k, paged_v, page_ranges(lengths, first_rows, start)),
    ):
        state = kernels.new_state(len(q), q.shape[1], v.shape[2])
        kernels.attend(q, keys, values, state, k_ranges=k_ranges, **options)
        found.append(state)
    return found


def assert_same_states(one, other):
    for a, b in zip(one, other, strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(("rows", "decode"), [(150, False), (3, False), (3, True)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", [0, 700])
def test_pages_of_a_cache_change_no_bit(
    attention_kernels, dtype, rng, rows, decode, threads, window
):
    lengths = [PAGE, PAGE, PAGE, 88]
    keys = sum(lengths)
    q, k, v = draw(rng, dtype, rows, keys)
    assert_same_states(
        *both_ways(
            attention_kernels, rng, q, k, v, lengths,
            q_start=keys - rows, threads=threads, window=window, decode=decode,
        )
    )  # fmt: skip


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    start=st.sampled_from([0, 5, 500, 512]),
    rows=st.integers(1, 120),
    kv_heads=st.integers(1, 3),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 90]),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_tile_in_many_pages_is_folded_once(
    kernels, dtype, lengths, start, rows, kv_heads, causal, window, threads, seed
):
    """However pages adjoin: a tile whose rows are not consecutive is put together first."""
    rng, keys = np.random.default_rng(seed), sum(lengths)
    q, k, v = draw(rng, dtype, rows, keys, 2 * kv_heads, kv_heads, 16, 8)
    assert_same_states(
        *both_ways(
            kernels, rng, q, k, v, lengths, q_start=start + max(keys - rows, 0), start=start,
            causal=causal, window=window, threads=threads,
        )
    )  # fmt: skip


def test_ranges_that_continue_each_other_are_one(attention_kernels, dtype, rng):
    q, k, v = draw(rng, dtype, 40, 700)
    whole, cut = (
        attention_kernels.attention(q, k, v, q_ranges=[(0, 660, 40)], k_ranges=ranges)
        for ranges in ([(0, 0, 700)], [(0, 0, 33), (0, 33, 100), (0, 133, 567)])
    )
    for a, b in zip(whole, cut, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("decode", "tile"), [(False, 64), (True, 512)])
def test_a_gpu_takes_pages_of_whole_tiles(cuda_kernels, rng, decode, tile):
    q, k, v = draw(rng, HALVES[0], 2, 600)
    ranges = [(0, 0, 32, 300), (0, 32, 100, 0)]
    says = f"expected a sequence to go on in other rows only at multiples of {tile} on CUDA, got 32"
    with pytest.raises(ValueError, match=says):
        cuda_kernels.attention(q, k, v, q_ranges=[(0, 130, 2)], k_ranges=ranges, decode=decode)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("dims", [(576, 512), (576, 64), (24, 512)], ids=str)
def test_keys_of_576_dims_and_values_of_512(attention_kernels, dtype, rng, rows, dims):
    """Attention on a latent of 512 dims, with 64 more of keys that carry the position."""
    q, k, v = draw(rng, dtype, rows, 150, 4, 1, *dims)
    for decode in (False, True):
        o, lse = attention_kernels.attention(
            q, k, v, q_ranges=[(0, 150 - rows, rows)], decode=decode
        )
        want, want_lse = reference.attention(
            wide(q), wide(k), wide(v), np.arange(150 - rows, 150), np.arange(150),
            kv_head_of_q=[0] * 4, scale=dims[0] ** -0.5, causal=True,
        )  # fmt: skip
        assert_close(o, want, DTYPES[dtype.name])
        assert_lse_close(lse, want_lse, DTYPES[dtype.name])


@pytest.mark.parametrize("pages", [[512, 88], [100, 500]], ids=str)
def test_a_block_of_keys_names_the_rows_of_its_ranges(best_kernels, dtype, rng, pages):
    """As a model calls kernels: by a layout, with workspaces of the arena."""
    q, k, v = draw(rng, dtype, 20, sum(pages))
    ranges = Layout((Range(0, 0, pages[0]), Range(0, pages[0], pages[1])))
    swapped = (
        np.concatenate([k[pages[0] :], k[: pages[0]]]),
        np.concatenate([v[pages[0] :], v[: pages[0]]]),
    )
    spec = AttentionSpec(np.zeros(2, np.int32), 0.2, causal=True)
    found = []
    for kv in (
        KvBlock(k, v, Layout((Range(0, 0, sum(pages)),))),
        KvBlock(*swapped, ranges, np.array([pages[1], 0])),
    ):
        state = best_kernels.new_state(20, 2, v.shape[2])
        q_layout = Layout((Range(0, sum(pages) - 20, 20),))
        best_kernels.kernels.attend_block(q, q_layout, kv, state, spec)
        found.append(state)
    assert_same_states(*found)
