"""MLPs in one pass: the bits of two linears, whatever the rows of a pass, and values."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa.verify import reference
from support.compare import assert_close, assert_same_bits, normal, wide


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group_rows", [None, (97,), (0, 130, 1, 0, 7)])
@pytest.mark.parametrize("hidden", [1, 511, 513, 1100])
def test_mlp_has_the_bits_of_two_linears(kernels, dtype, rng, gated, group_rows, hidden):
    groups = 1 if group_rows is None else len(group_rows)
    rows, width, n = 97 if group_rows is None else sum(group_rows), 70, 130
    x, residual = normal(rng, (rows, width), dtype), normal(rng, (rows, n), dtype)
    up, gate = (normal(rng, (groups, hidden, width), dtype, width**-0.5) for _ in range(2))
    down = normal(rng, (groups, n, hidden), dtype, hidden**-0.5)
    up_bias, gate_bias = (normal(rng, (groups, hidden), dtype) for _ in range(2))
    bias = normal(rng, (groups, n), dtype)
    if group_rows is None:
        up, gate, down, up_bias, gate_bias, bias = (
            a[0] for a in (up, gate, down, up_bias, gate_bias, bias)
        )
    between = (
        kernels.gated_linear(
            x,
            gate,
            up,
            activation="silu",
            bias_gate=gate_bias,
            bias_up=up_bias,
            group_rows=group_rows,
        )
        if gated
        else kernels.linear(x, up, bias=up_bias, activation="silu", group_rows=group_rows)
    )
    want_branch = np.empty((rows, n), dtype)
    want = kernels.linear(
        between, down, bias=bias, residual=residual, branch=want_branch, group_rows=group_rows
    )
    for threads, item_rows in ((1, 1), (1, 96), (2, 40), (3, 1000)):
        branch = np.empty((rows, n), dtype)
        out = kernels.mlp(
            x,
            up,
            down,
            gate=gate if gated else None,
            activation="silu",
            bias_gate=gate_bias if gated else None,
            bias_up=up_bias,
            bias=bias,
            residual=residual,
            branch=branch,
            group_rows=group_rows,
            item_rows=item_rows,
            threads=threads,
        )
        assert_same_bits(out, want)
        assert_same_bits(branch, want_branch)


def test_mlp_may_replace_its_rows(kernels, dtype, rng):
    x = normal(rng, (200, 60), dtype)
    up, down = normal(rng, (700, 60), dtype, 0.1), normal(rng, (60, 700), dtype, 0.1)
    options = {"activation": "gelu", "item_rows": 50, "threads": 2}
    want = kernels.mlp(x, up, down, **options)
    kernels.mlp(x, up, down, out=x, **options)
    assert_same_bits(x, want)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    group_rows=st.lists(st.integers(0, 210), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 700), st.integers(0, 1100), st.integers(1, 300)),
    item_rows=st.integers(1, 300),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_bits_of_mlps(kernels, dtype, group_rows, sizes, item_rows, threads, seed):
    rng, (width, hidden, n) = np.random.default_rng(seed), sizes
    x = normal(rng, (sum(group_rows), width), dtype)
    up = normal(rng, (len(group_rows), hidden, width), dtype, width**-0.5)
    down = normal(rng, (len(group_rows), n, hidden), dtype, max(hidden, 1) ** -0.5)
    between = kernels.linear(x, up, activation="gelu_tanh", group_rows=group_rows)
    want = kernels.linear(between, down, group_rows=group_rows)
    out = kernels.mlp(
        x,
        up,
        down,
        activation="gelu_tanh",
        group_rows=group_rows,
        item_rows=item_rows,
        threads=threads,
    )
    assert out.tobytes() == want.tobytes()


def test_mlp_against_the_formula(kernels, dtype, rng):
    x, gate, up = (normal(rng, (r, 200), dtype, s) for r, s in ((33, 1), (590, 0.07), (590, 0.07)))
    down = normal(rng, (75, 590), dtype, 0.05)
    got = kernels.mlp(x, up, down, gate=gate, activation="silu", out_dtype=np.float32)
    assert_close(got, reference.mlp(wide(x), wide(up), wide(down), wide(gate), "silu"), dtype)
    got = kernels.mlp(x, up, down, activation="gelu")
    assert_close(got, reference.mlp(wide(x), wide(up), wide(down), None, "gelu"), dtype)


def test_two_layers_against_torch(kernels, dtype, rng):
    torch = pytest.importorskip("torch", reason="torch is the second opinion on the MLP")
    x = normal(rng, (33, 96), dtype)
    gate, up = normal(rng, (150, 96), dtype, 0.1), normal(rng, (150, 96), dtype, 0.1)
    down = normal(rng, (96, 150), dtype, 0.1)
    tensors = [torch.tensor(wide(a)) for a in (x, gate, up, down)]
    functional = torch.nn.functional
    hidden = functional.silu(tensors[0] @ tensors[1].T) * (tensors[0] @ tensors[2].T)
    ours = kernels.mlp(x, up, down, gate=gate, activation="silu")
    assert_close(ours, (hidden @ tensors[3].T).numpy(), dtype)
    for activation, options in [("gelu", {}), ("gelu_tanh", {"approximate": "tanh"})]:
        want = functional.gelu(tensors[0] @ tensors[1].T, **options)
        assert_close(kernels.linear(x, gate, activation=activation), want.numpy(), dtype)
