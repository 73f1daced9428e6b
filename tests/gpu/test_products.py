"""Linear layers and MLPs on a GPU against float64, and rows whose bits depend on no other row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pympa.kernels import MlpWeights
from pympa.verify import reference
from support.compare import HALVES, assert_close, assert_same_bits, normal, wide
from support.shapes import products

examples = settings.get_profile("devices")
activations = st.sampled_from(["none", "gelu", "gelu_tanh", "silu"])


@examples
@given(data=st.data(), activation=activations)
def test_linear_matches_the_formula(rig, data, activation):
    call = data.draw(products(rig))
    shape = (len(call.x), call.n)
    out_dtype = data.draw(st.sampled_from([call.dtype, call.dtype, np.dtype(np.float32)]))
    weight = call.weight(call.n, call.x.shape[1])
    bias = call.bias(call.n) if data.draw(st.booleans()) else None
    residual = normal(call.rng, shape, out_dtype) if data.draw(st.booleans()) else None
    keeps_branch = data.draw(st.booleans())
    with rig.scope():
        out = rig.empty(shape, out_dtype)
        branch = rig.empty(shape, out_dtype) if keeps_branch else None
        rig.kernels.linear(
            rig.put(call.x),
            rig.weight(weight),
            out,
            bias=None if bias is None else rig.put(bias),
            activation=activation,
            residual=None if residual is None else rig.put(residual),
            branch=branch,
            group_rows=call.group_rows(),
        )
        got, got_branch = rig.get(out), branch if branch is None else rig.get(branch)
    want = np.empty(shape)
    for rows, group in call.parts():
        wide_bias = None if bias is None else wide(bias[group])
        product = reference.linear(wide(call.x[rows]), wide(weight[group]), wide_bias)
        want[rows] = reference.activate(product, activation)
    if got_branch is not None:
        assert_close(got_branch, want, call.dtype)
    assert_close(got, want if residual is None else want + wide(residual), call.dtype)


@examples
@given(data=st.data(), activation=activations)
def test_a_row_of_linear_has_its_bits_in_any_company(rig, data, activation):
    call = data.draw(products(rig))
    if call.groups is not None:
        call.groups = None
    weight = call.weight(call.n, call.x.shape[1])
    bias = call.bias(call.n) if data.draw(st.booleans()) else None
    with rig.scope():
        packed = rig.weight(weight)
        device_bias = None if bias is None else rig.put(bias)

        def run(x):
            out = rig.empty((len(x), call.n), call.dtype)
            rig.kernels.linear(rig.put(x), packed, out, bias=device_bias, activation=activation)
            return rig.get(out)

        whole = run(call.x)
        for count in (1, 2, 127, 128, 129):
            start = data.draw(st.integers(0, max(len(call.x) - 1, 0)))
            part = slice(start, start + count)
            assert_same_bits(run(call.x[part]), whole[part])
        assert_same_bits(run(call.x), whole)


@examples
@given(data=st.data(), gated=st.booleans(), activation=activations)
def test_mlp_matches_the_formula_row_by_row(rig, data, gated, activation):
    call = data.draw(products(rig))
    width, hidden = call.x.shape[1], data.draw(st.integers(1, rig.most(600, 40)))
    up, gate = call.weight(hidden, width), call.weight(hidden, width) if gated else None
    down, bias = call.weight(call.n, hidden), call.bias(call.n)
    with rig.scope():
        weights = MlpWeights(
            rig.weight(up),
            rig.weight(down),
            activation,
            gate=None if gate is None else rig.weight(gate),
        )
        device_bias = rig.put(bias)

        def run(x, groups):
            out = rig.empty((len(x), call.n), call.dtype)
            rig.kernels.mlp(rig.put(x), weights, out, bias=device_bias, group_rows=groups)
            return rig.get(out)

        got = run(call.x, call.group_rows())
        if call.groups is None and len(call.x):
            part = slice(len(call.x) // 2, len(call.x))
            assert_same_bits(run(call.x[part], None), got[part])
    want = np.empty((len(call.x), call.n))
    for rows, group in call.parts():
        want[rows] = reference.mlp(
            wide(call.x[rows]),
            wide(up[group]),
            wide(down[group]),
            None if gate is None else wide(gate[group]),
            activation,
            down_bias=wide(bias[group]),
        )
    assert_close(got, want, call.dtype)


def test_large_products_match_the_formula_in_sampled_rows(rig):
    """More rows than one pass of the workspace takes, and sizes of real models."""
    rng = np.random.default_rng(1)
    m, n, k = rig.most(5000, 30), rig.most(4096, 24), rig.most(4096, 32)
    rows = np.unique(np.linspace(0, m - 1, 40).astype(int))
    for dtype in HALVES:
        x, weight = normal(rng, (m, k), dtype), normal(rng, (n, k), dtype, k**-0.5)
        with rig.scope():
            out = rig.empty((m, n), dtype)
            rig.kernels.linear(rig.put(x), rig.weight(weight), out)
            got = rig.get(out)
        assert np.isfinite(wide(got)).all()
        assert_close(got[rows], reference.linear(wide(x[rows]), wide(weight)), dtype)
