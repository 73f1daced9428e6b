"""CUDA's row kernels, products and routing beyond what all kernels share."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa.verify import reference
from support.compare import assert_close, assert_same_bits, normal, wide

examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@examples
@given(st.data())
def test_copies_between_strided_arrays(cuda_kernels, data):
    dtype = data.draw(st.sampled_from([np.uint8, np.float16, ml_dtypes.bfloat16, np.int32, "i8"]))
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    shape[-1] = data.draw(st.sampled_from([shape[-1], 64, 300]))

    def strided():
        """Return a view with gaps, its dimensions but the last in any order in memory."""
        order = [*data.draw(st.permutations(range(len(shape) - 1))), len(shape) - 1]
        steps = [data.draw(st.integers(1, 2)) for _ in shape[:-1]] + [1]
        first = data.draw(st.integers(0, 3))
        whole = [shape[axis] * steps[axis] for axis in order]
        whole[-1] += first + data.draw(st.integers(0, 3))
        memory = np.random.default_rng(len(shape)).integers(0, 100, whole).astype(dtype)
        view = memory.transpose(np.argsort(order))
        return view[(*(slice(None, None, step) for step in steps[:-1]), slice(first, None))][
            ..., : shape[-1]
        ]

    source, out = strided(), strided()
    cuda_kernels.core.copy(source, out, cuda_kernels.on())
    assert out.tobytes() == source.tobytes()


def test_copies_repeat_rows_and_stay_inside(cuda_kernels, rng):
    row, memory = rng.random((1, 1, 40), np.float32), np.zeros((4, 6, 48), np.float32)
    out = memory[1:3, ::2, 4:44]
    for source in (np.broadcast_to(row, out.shape), row, 2 * row[:, :, :1]):
        cuda_kernels.core.copy(source, out, cuda_kernels.on())
        assert (out == source).all()
        assert np.count_nonzero(memory) == out.size


def test_copies_of_other_arrays_are_refused(cuda_kernels):
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"copy: out: expected shape \[3, 4\], got \[4, 3\]"):
        cuda_kernels.core.copy(x, np.ones((4, 3), np.float32), cuda_kernels.on())
    with pytest.raises(ValueError, match=r"copy: out: expected dtype float32, got float16"):
        cuda_kernels.core.copy(x, np.ones((3, 4), np.float16), cuda_kernels.on())


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("columns", [256, 1024, 2049, 16384, 20001])
def test_norms_of_any_width(cuda_kernels, dtype, rng, kind, columns):
    x, weight = normal(rng, (3, columns + 8), dtype), normal(rng, columns, dtype)
    results = []
    for first in (0, 1):  # the second view starts at no multiple of 16 bytes
        here = np.ascontiguousarray(x[:, 1 : 1 + columns]) if first == 0 else x[:, 1 : 1 + columns]
        out = np.full((3, columns), np.nan, dtype)
        cuda_kernels.core.norm(here, weight, None, 1e-5, kind, 0.0, None, 0, out, cuda_kernels.on())
        results.append(out)
    assert_close(results[0], reference.norm(wide(here), wide(weight), None, 1e-5, kind), dtype)
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_rows_beyond_a_pass(cuda_kernels, rng, activation, with_residual):
    dtype = np.dtype(ml_dtypes.bfloat16)
    rows, n, k = 4100, 9, 5
    x, weight = normal(rng, (rows, k), dtype), normal(rng, (n, k), dtype)
    residual = normal(rng, (rows, n), dtype) if with_residual else None
    whole = cuda_kernels.linear(x, weight, activation=activation, residual=residual)
    for part in (slice(0, 3), slice(4090, 4100)):
        alone = cuda_kernels.linear(
            x[part],
            weight,
            activation=activation,
            residual=None if residual is None else residual[part],
        )
        assert_same_bits(whole[part], alone)


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "silu"])
@pytest.mark.parametrize("n", [16, 21])
def test_results_anywhere_have_the_same_bits(cuda_kernels, dtype, rng, activation, n):
    x, weight, bias = (normal(rng, shape, dtype) for shape in ((6, 10), (n, 10), n))
    memory, branches = normal(rng, (6, n + 7), dtype), np.zeros((6, n + 7), dtype)
    residual, branch = normal(rng, (6, n), dtype), np.zeros((6, n), dtype)
    options = {"bias": bias, "activation": activation}
    plain = cuda_kernels.linear(x, weight, **options)
    sums = cuda_kernels.linear(x, weight, residual=residual, branch=branch, **options)
    assert_same_bits(branch, plain)
    out, before = memory[:, 3 : 3 + n], memory.copy()
    cuda_kernels.linear(x, weight, out=out, **options)
    assert_same_bits(np.ascontiguousarray(out), plain)
    out[:] = residual
    cuda_kernels.linear(x, weight, residual=out, branch=branches[:, 1 : 1 + n], out=out, **options)
    assert_same_bits(np.ascontiguousarray(out), sums)
    assert_same_bits(np.ascontiguousarray(branches[:, 1 : 1 + n]), plain)
    assert_same_bits(memory[:, :3], before[:, :3])
    assert_same_bits(memory[:, 3 + n :], before[:, 3 + n :])


def test_workspaces_do_not_grow_beyond_a_pass(cuda_kernels):
    def size(rows, gated):
        return cuda_kernels.core.linear_workspace_bytes(
            rows, 14336, 4096, "bfloat16", gated, cuda_kernels.on()
        )

    assert size(4096, False) == size(10**6, False) < 240e6
    assert size(10**6, True) < 2 * size(4096, False)


def test_packed_rows_start_at_multiples_of_16_bytes(cuda_kernels, dtype, rng):
    weight = normal(rng, (3, 5), dtype)
    rows = cuda_kernels.pack(weight).reshape(3, -1)
    assert rows.shape[1] % 16 == 0
    assert rows.tobytes() == b"".join(
        row.tobytes() + bytes(rows.shape[1] - row.nbytes) for row in weight
    )
    memory = np.zeros(rows.nbytes + 32, np.uint8)
    first = 8 - memory.ctypes.data % 8 + 1
    with pytest.raises(ValueError, match="pack_weight: packed: expected an address that is a mul"):
        cuda_kernels.core.pack_weight(
            weight, memory[first : first + rows.nbytes], cuda_kernels.on()
        )


@pytest.mark.parametrize(
    ("rows", "choices", "count"),
    [(1023, 1, 5), (1024, 2, 5), (700, 3, 40), (2500, 2, 1), (1500, 2, 2000), (3, 2, 4000)],
)
def test_sorts_of_several_blocks(cuda_kernels, rng, rows, choices, count):
    experts = rng.integers(-1, count, (rows, choices + 3)).astype(np.int32)[:, 1 : 1 + choices]
    counts = np.full(count, -7, np.int64)
    sources = np.full(experts.size, -7, np.int32)
    inverse = np.full((rows, choices + 1), -7, np.int32)
    cuda_kernels.core.sort_rows(experts, counts, sources, inverse[:, 1:], cuda_kernels.on())
    flat = experts.ravel()
    kept = np.flatnonzero(flat >= 0)
    order = kept[np.argsort(flat[kept], kind="stable")]
    np.testing.assert_array_equal(counts, np.bincount(flat[kept], minlength=count))
    np.testing.assert_array_equal(sources[: len(order)], order // choices)
    assert (sources[len(order) :] == -7).all()
    want_inverse = np.full(flat.size, -1)
    want_inverse[order] = np.arange(len(order))
    np.testing.assert_array_equal(inverse[:, 1:].ravel(), want_inverse)
    assert (inverse[:, 0] == -7).all()


def test_products_need_no_library_here(cuda_kernels):
    assert cuda_kernels.core.load_gemm("") == 0
