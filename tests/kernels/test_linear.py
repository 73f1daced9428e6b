"""Linear layers: values against float64, and the contract on bits of their sums."""

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa.verify import reference
from support.compare import assert_close, assert_each_close, assert_same_bits, normal, wide


@pytest.fixture
def kernels(all_kernels):
    return all_kernels


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 1, 1),
        (1, 300, 513),
        (7, 65, 33),
        (97, 130, 1025),
        (5, 16, 512),
        (0, 8, 8),
        (200, 515, 64),
    ],
)
def test_matches_the_formula(kernels, dtype, rng, m, n, k):
    x, weight = normal(rng, (m, k), dtype), normal(rng, (n, k), dtype, k**-0.5)
    bias = normal(rng, n, dtype)
    assert_close(kernels.linear(x, weight), reference.linear(wide(x), wide(weight)), dtype)
    want = reference.linear(wide(x), wide(weight), wide(bias))
    assert_close(kernels.linear(x, weight, bias=bias), want, dtype)


@pytest.mark.parametrize("n", [1, 64, 200])
def test_a_weight_is_packed_in_pieces(cpu_kernels, dtype, rng, monkeypatch, n):
    """Of 64 rows here; the last may have fewer, and the rows may lie in a wider array."""
    monkeypatch.setattr("pympa.kernels.LOADED_BYTES", 1)
    weight, read = normal(rng, (n, 40), dtype)[:, 3:36], []

    def rows(first, last, out):
        assert out.shape == (last - first, 33)
        read.append((first, last))
        return weight[first:last]

    packed = cpu_kernels.kernels.pack(weight.shape, dtype, rows)
    assert read == [(first, min(first + 64, n)) for first in range(0, n, 64)]
    whole = cpu_kernels.kernels.read(packed.data)
    assert_same_bits(whole, cpu_kernels.pack(np.ascontiguousarray(weight)))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (65, 33), (70, 17), (64, 31)])
@pytest.mark.parametrize("at_the_end", [True, False])
def test_packing_reads_nothing_else(cpu_kernels, dtype, rng, n, k, at_the_end):
    """The weight may be the last, or first, of a memory map: no page is there to read beyond it."""
    weight = normal(rng, (n, k), dtype)
    size = -(-weight.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
    memory = np.frombuffer(pages, np.uint8)
    for page in (0, mmap.PAGESIZE + size):
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(memory.ctypes.data + page)
        assert libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0  # PROT_NONE
    first = mmap.PAGESIZE + (size - weight.nbytes if at_the_end else 0)
    there = memory[first : first + weight.nbytes].view(dtype).reshape(n, k)
    there[...] = weight
    assert_same_bits(cpu_kernels.pack(there), cpu_kernels.pack(weight))


@pytest.mark.parametrize("m", [1, 2, 16, 30])
def test_no_inputs_leave_the_bias(kernels, dtype, rng, m):
    bias = normal(rng, 70, dtype)
    out = kernels.linear(np.zeros((m, 0), dtype), np.zeros((70, 0), dtype), bias=bias)
    assert (out == bias).all()


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
def test_activation_residual_and_branch(kernels, dtype, rng, activation):
    m, n, k = 19, 75, 129
    x, weight = normal(rng, (m, k), dtype), normal(rng, (n, k), dtype, 2 * k**-0.5)
    bias, residual = normal(rng, n, dtype), normal(rng, (m, n), dtype)
    branch = np.empty((m, n), dtype)
    out = kernels.linear(
        x, weight, bias=bias, activation=activation, residual=residual, branch=branch
    )
    want = reference.activate(reference.linear(wide(x), wide(weight), wide(bias)), activation)
    assert_close(branch, want, dtype)
    # out adds the *rounded* branch: exactly what the elementwise kernel gives.
    expected = np.empty_like(out)
    kernels.core.add(residual, branch, expected, kernels.on(1))
    assert out.tobytes() == expected.tobytes()


def test_out_may_be_the_residual(kernels, dtype, rng):
    x, weight = normal(rng, (9, 40), dtype), normal(rng, (33, 40), dtype)
    residual = normal(rng, (9, 33), dtype)
    separate = kernels.linear(x, weight, residual=residual)
    kernels.linear(x, weight, residual=residual, out=residual)
    assert_same_bits(residual, separate)


def test_float32_output_is_not_rounded(kernels, dtype, rng):
    x, weight = normal(rng, (11, 700), dtype), normal(rng, (70, 700), dtype, 0.05)
    out = kernels.linear(x, weight, out_dtype=np.float32)
    want = reference.linear(wide(x), wide(weight))
    assert_close(out, want, kernels.accuracy(dtype))
    rounded = kernels.linear(x, weight)
    assert rounded.tobytes() == out.astype(dtype).tobytes()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("biased", [False, True])
def test_gated(kernels, dtype, rng, activation, biased):
    m, n, k = 101, 590, 200
    x = normal(rng, (m, k), dtype)
    gate, up = normal(rng, (n, k), dtype, k**-0.5), normal(rng, (n, k), dtype, k**-0.5)
    bias_gate = normal(rng, n, dtype) if biased else None
    bias_up = normal(rng, n, dtype) if biased else None
    out = kernels.gated_linear(
        x, gate, up, activation=activation, bias_gate=bias_gate, bias_up=bias_up
    )
    left = reference.linear(wide(x), wide(gate), wide(bias_gate) if biased else None)
    right = reference.linear(wide(x), wide(up), wide(bias_up) if biased else None)
    assert_close(out, reference.activate(left, activation) * right, dtype)


def test_strided_rows(kernels, dtype, rng):
    wide_x, wide_out = normal(rng, (12, 100), dtype), np.zeros((12, 90), dtype)
    weight = normal(rng, (80, 70), dtype)
    x, w = wide_x[::2, 5:75], weight[::3, 1:67]
    plain = kernels.linear(np.ascontiguousarray(x[:, :66]), np.ascontiguousarray(w))
    out = wide_out[::2, 3 : 3 + len(w)]
    kernels.linear(x[:, :66], w, out=out)
    assert_same_bits(np.ascontiguousarray(out), plain)
    assert not wide_out[1::2].any()
    assert not wide_out[:, 3 + len(w) :].any()


def test_one_row_without_a_stride(kernels, dtype, rng):
    x, weight = normal(rng, 83, dtype), normal(rng, (20, 83), dtype)
    assert x[None].strides[0] == 0
    assert_same_bits(kernels.linear(x[None], weight), kernels.linear(x.reshape(1, 83), weight))


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    m=st.integers(1, 210),
    n=st.integers(1, 700),
    k=st.integers(1, 1100),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_bits_depend_on_nothing_but_the_row(kernels, dtype, m, n, k, threads, seed):
    rng = np.random.default_rng(seed)
    x, weight = normal(rng, (m, k), dtype), normal(rng, (n, k), dtype, k**-0.5)
    whole = kernels.linear(x, weight, activation="gelu")
    threaded = kernels.linear(x, weight, activation="gelu", threads=threads)
    assert whole.tobytes() == threaded.tobytes()
    first, last = sorted(rng.integers(0, m + 1, 2))
    left, right = sorted(rng.integers(0, n + 1, 2))
    part = kernels.linear(
        np.ascontiguousarray(x[first:last]), weight[left:right], activation="gelu"
    )
    assert part.tobytes() == np.ascontiguousarray(whole[first:last, left:right]).tobytes()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (70, 513), (515, 1100), (1030, 64), (128, 2048)])
def test_few_rows_have_the_bits_of_many(kernels, dtype, rng, n, k):
    x = normal(rng, (60, k), dtype)
    weight, up = normal(rng, (n, k), dtype, k**-0.5), normal(rng, (n, k), dtype, k**-0.5)
    whole = kernels.linear(x, weight)
    gated = kernels.gated_linear(x, weight, up, activation="silu")
    for rows in (*range(1, 10), 12, 15, 16, 17):
        part = slice(20, 20 + rows)
        assert_same_bits(kernels.linear(x[part], weight, threads=2), whole[part])
        assert_same_bits(kernels.gated_linear(x[part], weight, up, activation="silu"), gated[part])


def test_sums_are_partials_of_512(cpu_kernels, rng):
    # A GPU's library orders the sum in its own way, the same for any number of rows.
    x, weight = normal(rng, (5, 1300), np.float32), normal(rng, (20, 1300), np.float32)
    total = np.zeros((5, 20), np.float32)
    for k in range(0, 1300, 512):
        part = np.ascontiguousarray(x[:, k : k + 512])
        total += cpu_kernels.linear(part, np.ascontiguousarray(weight[:, k : k + 512]))
    assert_same_bits(cpu_kernels.linear(x, weight), total)


@pytest.mark.parametrize(
    "group_rows", [(13,), (0, 97, 0, 3), (1, 2, 5, 8), (100, 0, 1, 96), (0, 0)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_groups_are_separate_linears(kernels, dtype, rng, group_rows, biased):
    n, k, groups, rows = 530, 70, len(group_rows), sum(group_rows)
    x, residual = normal(rng, (rows, k), dtype), normal(rng, (rows, n), dtype)
    weight, up = (normal(rng, (groups, n, k), dtype, k**-0.5) for _ in range(2))
    bias, bias_up = (normal(rng, (groups, n), dtype) if biased else None for _ in range(2))
    branch = np.empty((rows, n), dtype)
    options = {"activation": "silu", "group_rows": group_rows}
    whole = kernels.linear(x, weight, bias=bias, residual=residual, branch=branch, **options)
    gated = kernels.gated_linear(x, weight, up, bias_gate=bias, bias_up=bias_up, **options)
    for group, stop in enumerate(np.cumsum(group_rows)):
        here = slice(stop - group_rows[group], stop)
        own, own_up = (None if b is None else b[group] for b in (bias, bias_up))
        alone = np.empty_like(branch[here])
        out = kernels.linear(
            x[here],
            weight[group],
            bias=own,
            residual=residual[here],
            branch=alone,
            activation="silu",
        )
        assert_same_bits(whole[here], out)
        assert_same_bits(branch[here], alone)
        out = kernels.gated_linear(
            x[here], weight[group], up[group], activation="silu", bias_gate=own, bias_up=own_up
        )
        assert_same_bits(gated[here], out)


def test_groups_of_strided_rows(kernels, dtype, rng):
    wide_x, wide_out = normal(rng, (14, 90), dtype), np.zeros((14, 50), np.float32)
    weight, wide_bias = normal(rng, (3, 33, 70), dtype), normal(rng, (6, 33), dtype)
    x, bias, out = wide_x[::2, 5:75], wide_bias[1::2], wide_out[1::2, 3:36]
    kernels.linear(x, weight, bias=bias, group_rows=(4, 0, 3), out=out)
    plain = kernels.linear(
        np.ascontiguousarray(x),
        weight,
        bias=np.ascontiguousarray(bias),
        group_rows=(4, 0, 3),
        out_dtype=np.float32,
    )
    assert_same_bits(np.ascontiguousarray(out), plain)
    assert not wide_out[::2].any()
    assert not wide_out[:, 36:].any()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    group_rows=st.lists(st.integers(0, 210), min_size=1, max_size=5),
    n=st.integers(1, 600),
    k=st.integers(1, 600),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_bits_of_groups(kernels, dtype, group_rows, n, k, threads, seed):
    rng = np.random.default_rng(seed)
    x = normal(rng, (sum(group_rows), k), dtype)
    weight = normal(rng, (len(group_rows), n, k), dtype, k**-0.5)
    options = {"activation": "gelu", "threads": threads}
    whole = kernels.linear(x, weight, group_rows=group_rows, **options)
    parts = np.split(x, np.cumsum(group_rows)[:-1])
    alone = [kernels.linear(*pair, **options) for pair in zip(parts, weight, strict=True)]
    assert whole.tobytes() == b"".join(part.tobytes() for part in alone)


def test_nan_reaches_its_row_only(kernels, dtype, rng):
    x, weight = normal(rng, (8, 50), dtype), normal(rng, (70, 50), dtype)
    x[3, 17] = np.nan
    for activation in ("none", "gelu", "gelu_tanh", "silu"):
        broken = np.isnan(kernels.linear(x, weight, activation=activation).astype(np.float32))
        assert broken[3].all()
        assert not np.delete(broken, 3, axis=0).any()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_over_their_whole_range(kernels, activation):
    # The identity weight leaves the activation alone; rows of like size check the tails too.
    x = np.concatenate([np.linspace(-12, 12, 4096), [-90.0, -30.0, 0.0, 30.0, 90.0, 3e38]])
    x = np.resize(x.astype(np.float32), (x.size, 1))
    got = kernels.linear(x, np.ones((1, 1), np.float32), activation=activation)[:, 0]
    want = reference.activate(x.astype(np.float64), activation)[:, 0]
    moderate = np.abs(x[:, 0]) < 4
    assert_each_close(got[moderate], want[moderate], np.float32)
    assert_each_close(got, want, np.float32, least=0.05)
