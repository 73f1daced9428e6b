"""Rotary embeddings of halves and of neighbours: values, slices, threads."""

import numpy as np
import pytest

from support.compare import assert_close, assert_same_bits, normal
from support.oracles import rotated


@pytest.fixture
def kernels(all_kernels):
    return all_kernels


def tables(half, positions=64):
    angle = np.arange(positions)[:, None] * 100.0 ** (-np.arange(half) / max(half, 1))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(kernels, x, cos, sin, index, interleaved, threads=1):
    kernels.core.rope(x, cos, sin, index, interleaved, kernels.on(threads))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "half"), [(2, 1), (64, 32), (50, 25), (80, 16), (9, 4), (40, 20), (5, 0)]
)
def test_rope(kernels, dtype, rng, head_dim, half, interleaved):
    x = normal(rng, (30, 3, head_dim), dtype)
    index = rng.integers(0, 64, 30).astype(np.int32)
    cos, sin = tables(half)
    turned = x.copy()
    rotate(kernels, turned, cos, sin, index, interleaved)
    assert_close(turned, rotated(x, cos, sin, index, interleaved), dtype)
    assert turned[..., 2 * half :].tobytes() == x[..., 2 * half :].tobytes()
    threaded = x.copy()
    rotate(kernels, threaded, cos, sin, index, interleaved, 3)
    assert threaded.tobytes() == turned.tobytes()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [slice(0, 32), slice(16, 48), slice(5, 37), slice(13, 22)])
def test_rope_on_a_slice(kernels, dtype, rng, dims, interleaved):
    """Of heads, and of the dimensions of a head, as the rotated part of a latent key."""
    fused = normal(rng, (12, 6, 48), dtype)
    before, index = fused.copy(), np.arange(12, dtype=np.int32)
    here = fused[:, 2:5, dims]
    cos, sin = tables(here.shape[2] // 2)
    plain = np.ascontiguousarray(here)
    rotate(kernels, plain, cos, sin, index, interleaved)
    rotate(kernels, here, cos, sin, index, interleaved)
    assert_same_bits(np.ascontiguousarray(here), plain)
    here[:] = before[:, 2:5, dims]
    assert_same_bits(fused, before)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_heads_that_share_a_slice(kernels, dtype, rng, rows):
    """One head of all heads' shared dimensions, a slice of a row of more."""
    memory = normal(rng, (rows, 1, 90), dtype)
    x, index = memory[:, :, 64:80], np.arange(rows, dtype=np.int32)
    cos, sin = tables(8)
    want = rotated(x, cos, sin, index, True)
    rotate(kernels, x, cos, sin, index, True)
    assert_close(x, want, dtype)


def test_interleaved_rope_is_rope_of_parted_pairs(kernels, dtype, rng):
    """The same arithmetic on the same numbers, so the same bits."""
    x, index = normal(rng, (7, 2, 44), dtype), np.arange(7, dtype=np.int32)
    cos, sin = tables(22)
    parted = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    rotate(kernels, x, cos, sin, index, True)
    rotate(kernels, parted, cos, sin, index, False)
    assert_same_bits(np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1), parted)
