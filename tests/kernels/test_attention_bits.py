"""The contract on bits of attention: a row's bits depend on that row and the keys it sees."""

import subprocess
import sys

import numpy as np
import pytest

from support.compare import assert_same_bits, normal
from support.lanes import FULL


@pytest.fixture
def kernels(attention_kernels):
    return attention_kernels


@pytest.fixture(params=["causal", "window", "softcap", "full"])
def options(request):
    return {
        "causal": {"causal": True},
        "window": {"causal": True, "window": 333},
        "softcap": {"causal": True, "softcap": 6.0},
        "full": {"causal": False},
    }[request.param]


@pytest.fixture
def qkv(rng, dtype):
    return (
        normal(rng, (700, 3, 24), dtype, 1.5),
        normal(rng, (700, 2, 24), dtype, 1.5),
        normal(rng, (700, 2, 37), dtype),
    )


def test_threads(kernels, qkv, options):
    one = kernels.attention(*qkv, **options)
    for threads in (2, 3):
        many = kernels.attention(*qkv, threads=threads, **options)
        assert_same_bits(many[0], one[0])
        assert_same_bits(many[1], one[1])


@pytest.mark.parametrize("size", [1, 50, 97, 512])
def test_query_chunks(kernels, qkv, options, size):
    q, k, v = qkv
    whole, whole_lse = kernels.attention(q, k, v, **options)
    starts = range(0, 700, size) if size > 1 else (0, 5, 511, 512, 699)
    for start in starts:
        length = min(size, 700 - start)
        part, lse = kernels.attention(
            q[start : start + size], k, v, q_ranges=[(0, start, length)], **options
        )
        assert_same_bits(part, whole[start : start + size])
        assert_same_bits(lse, whole_lse[start : start + size])


@pytest.mark.parametrize("size", [37, 200, 512])
@pytest.mark.parametrize("window", [0, 90, 600])
def test_streaming_with_a_cache(kernels, qkv, size, window):
    """Chunk by chunk, each against the keys so far, equals the whole sequence at once."""
    q, k, v = qkv
    whole, _ = kernels.attention(q, k, v, window=window)
    for start in range(0, 700, size):
        stop = min(start + size, 700)
        part, _ = kernels.attention(
            q[start:stop],
            k[:stop],
            v[:stop],
            q_ranges=[(0, start, stop - start)],
            window=window,
        )
        assert_same_bits(part, whole[start:stop])


def test_future_keys_may_hold_anything_finite(kernels, qkv):
    q, k, v = qkv
    whole, _ = kernels.attention(q, k, v)
    other_k, other_v = k.copy(), v.copy()
    other_k[300:], other_v[300:] = 100, -100
    part, _ = kernels.attention(q[:300], other_k, other_v)
    assert_same_bits(part, whole[:300])


def test_keys_cut_at_a_tile(kernels, qkv, dtype, options):
    q, k, v = qkv
    whole, whole_lse = kernels.attention(q, k, v, **options)
    q_ranges = [(0, 0, 700)]
    carried = kernels.new_state(700, 3, 37)
    kernels.attend(
        q, k[:512], v[:512], carried, q_ranges=q_ranges, k_ranges=[(0, 0, 512)], **options
    )
    kernels.attend(
        q, k[512:], v[512:], carried, q_ranges=q_ranges, k_ranges=[(0, 512, 188)], **options
    )
    o, lse = kernels.finish(carried, dtype)
    assert_same_bits(o, whole)
    assert_same_bits(lse, whole_lse)


@pytest.mark.parametrize("window", [1, 90, 333])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first", [0, 330, 511, 640])
def test_keys_that_no_query_sees_may_be_missing(kernels, qkv, window, causal, first):
    """As in the halo of a window: a block of keys may begin and end anywhere in a tile."""
    q, k, v = qkv
    rows, options = slice(first, first + 60), {"causal": causal, "window": window, "threads": 2}
    options["q_ranges"] = [(0, first, 60)]
    whole, whole_lse = kernels.attention(q[rows], k, v, **options)
    seen = slice(max(first - window + 1, 0), first + 60 if causal else first + 59 + window)
    halo, lse = kernels.attention(
        q[rows], k[seen], v[seen], k_ranges=[(0, seen.start, len(k[seen]))], **options
    )
    assert_same_bits(halo, whole)
    assert_same_bits(lse, whole_lse)


def test_other_sequences_and_heads_change_nothing(kernels, qkv):
    q, k, v = qkv
    alone, _ = kernels.attention(q[:, :1], k[:, :1], v[:, :1])
    ranges = [(4, 0, 700), (1, 0, 700)]
    both, _ = kernels.attention(
        np.concatenate([q[::-1], q]),
        np.concatenate([k[::-1], k]),
        np.concatenate([v[::-1], v]),
        q_ranges=ranges,
        k_ranges=ranges,
        kv_head_of_q=[0, 0, 1],
        threads=2,
    )
    assert_same_bits(np.ascontiguousarray(both[700:, :1]), alone)


@FULL
def test_a_long_sequence_stays_small():
    """65,536 tokens of one bfloat16 head of 128 in a process below 300 MB."""
    script = """
import re
from pathlib import Path
import ml_dtypes, numpy as np
from pympa import _core
on = _core.Execution(_core.supported_isas()[0])
tokens, dim, dtype = 65536, 128, ml_dtypes.bfloat16
q, k, v = (np.full((tokens, 1, dim), 0.5, dtype) for _ in range(3))
state = (np.full((tokens, 1), -np.inf, np.float32), np.zeros((tokens, 1), np.float32),
         np.zeros((tokens, 1, dim), np.float32))
workspace = np.zeros(_core.attention_workspace_bytes(dim, dim, "bfloat16", on), np.uint8)
ranges, keys = np.array([[0, 0, tokens]]), np.array([[0, 0, tokens, 0]])
_core.attend_block(q, k, v, ranges, keys, *state, np.zeros(1, np.int32), 0.1, True, 0, 0.0, False,
                   workspace, on)
o = np.empty(q.shape, dtype)
_core.finish(*state, o, np.empty((tokens, 1), np.float32), on)
assert (o == 0.5).all()
# Not ru_maxrss: that one starts from the parent's size.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 * 1024  # KiB
