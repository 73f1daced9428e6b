"""The clamped SwiGLU of gpt-oss in gated linears and MLPs: values, bits, groups and refusals."""

import re

import numpy as np
import pytest

from pympa.kernels import MlpWeights
from support.compare import assert_close, assert_each_close, assert_same_bits, normal, wide
from support.oracles import swiglu_clamped

LIMIT, ALPHA = 1.5, 1.702  # low enough that rows of normal numbers meet it
CLAMPED = {"activation": "swiglu_clamped", "limit": LIMIT, "alpha": ALPHA}


def formula(gate, up, limit=LIMIT, alpha=ALPHA):
    return swiglu_clamped(gate, up, limit, alpha)


def draw(rng, dtype, rows, hidden, width, groups=1):
    """Return x, and the weights and biases of gate and up, of a group of them if there is one."""
    x = normal(rng, (rows, width), dtype, 2.0)
    gate, up = (normal(rng, (groups, hidden, width), dtype, width**-0.5) for _ in range(2))
    biases = [normal(rng, (groups, hidden), dtype) for _ in range(2)]
    return x, gate, up, biases


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 300, 513), (0, 8, 8), (7, 65, 33), (101, 590, 200)]
)
def test_gated_linear(all_kernels, dtype, rng, m, n, k, biased):
    x, gate, up, biases = draw(rng, dtype, m, n, k)
    left, right = (wide(x) @ wide(weight[0]).T for weight in (gate, up))
    options = {}
    if biased:
        left, right = left + wide(biases[0]), right + wide(biases[1])
        options = {"bias_gate": biases[0][0], "bias_up": biases[1][0]}
    out = all_kernels.gated_linear(x, gate[0], up[0], **CLAMPED, **options)
    assert_close(out, formula(left, right), dtype)


@pytest.mark.parametrize(("limit", "alpha"), [(7.0, 1.702), (0.5, 1.0), (1e30, 3.0)])
def test_each_element(all_kernels, limit, alpha):
    """Weights of 1 leave the function alone: all pairs of numbers, the ends of float32 too."""
    sizes = [0.0, 1e-20, 1e-3, 0.3, 0.5, 0.51, 1.0, 2.5, 6.9, 7.0, 7.1, 30.0, 3e38]
    values = np.array([*sizes, *(-s for s in sizes)], np.float32)
    gate, up = (part.ravel() for part in np.meshgrid(values, values))
    x = np.stack([gate, up], axis=1)
    weights = np.array([[1, 0]], np.float32), np.array([[0, 1]], np.float32)
    got = all_kernels.gated_linear(
        x, *weights, activation="swiglu_clamped", limit=limit, alpha=alpha
    )[:, 0]
    with np.errstate(over="ignore"):
        want = formula(wide(gate), wide(up), limit, alpha)
        overflows = np.isinf(want.astype(np.float32))
    inside = (np.abs(gate) < 3) & (np.abs(up) < 1e8)
    assert_each_close(got[inside], want[inside], np.float32)
    assert (np.isfinite(got) == ~overflows).all()
    assert not np.isnan(got).any()
    small = np.abs(want) < 1e30  # an exponential's error grows with its argument
    assert_each_close(got[small], want[small], np.float32, least=0.05)


def test_nan_reaches_its_row_only(all_kernels, dtype, rng):
    x, gate, up, _ = draw(rng, dtype, 9, 70, 50)
    x[[2, 4], 17] = np.nan
    gate[0, :, 30], x[:, 30], x[6, 30] = 0, 0, np.inf  # 0 * inf: only gates of row 6 are broken
    broken = np.isnan(wide(all_kernels.gated_linear(x, gate[0], up[0], **CLAMPED)))
    assert broken[[2, 4, 6]].all()
    assert not np.delete(broken, [2, 4, 6], axis=0).any()


def test_few_rows_have_the_bits_of_many(all_kernels, dtype, rng):
    x, gate, up, _ = draw(rng, dtype, 60, 515, 130)
    whole = all_kernels.gated_linear(x, gate[0], up[0], **CLAMPED)
    for rows in (1, 2, 5, 16, 17):
        part = slice(20, 20 + rows)
        some = all_kernels.gated_linear(x[part], gate[0], up[0], threads=2, **CLAMPED)
        assert_same_bits(some, whole[part])


@pytest.mark.parametrize("group_rows", [(13,), (0, 97, 0, 3), (0, 0)])
def test_groups(all_kernels, dtype, rng, group_rows):
    x, gate, up, biases = draw(rng, dtype, sum(group_rows), 530, 70, len(group_rows))
    whole = all_kernels.gated_linear(
        x, gate, up, bias_gate=biases[0], bias_up=biases[1], group_rows=group_rows, **CLAMPED
    )
    for group, stop in enumerate(np.cumsum(group_rows)):
        here = slice(stop - group_rows[group], stop)
        own = {"bias_gate": biases[0][group], "bias_up": biases[1][group]}
        alone = all_kernels.gated_linear(x[here], gate[group], up[group], **own, **CLAMPED)
        assert_same_bits(whole[here], alone)


@pytest.mark.parametrize("group_rows", [(97,), (0, 130, 1, 0, 7)])
@pytest.mark.parametrize("hidden", [1, 513, 1100])
def test_mlp_has_the_bits_of_its_linears(kernels, dtype, rng, group_rows, hidden):
    x, gate, up, biases = draw(rng, dtype, sum(group_rows), hidden, 70, len(group_rows))
    down = normal(rng, (len(group_rows), 130, hidden), dtype, hidden**-0.5)
    own = {"bias_gate": biases[0], "bias_up": biases[1]}
    between = kernels.gated_linear(x, gate, up, group_rows=group_rows, **own, **CLAMPED)
    want = kernels.linear(between, down, group_rows=group_rows)
    for threads, item_rows in ((1, 1), (1, 96), (3, 1000)):
        out = kernels.mlp(
            x, up, down, gate=gate, group_rows=group_rows, item_rows=item_rows, threads=threads,
            **own, **CLAMPED,
        )  # fmt: skip
        assert_same_bits(out, want)


def test_mlp_of_a_model(kernels, dtype, rng):
    """As a model calls it, in one pass and in two; rows of experts."""
    x, gate, up, _ = draw(rng, dtype, 50, 40, 24, 3)
    down = normal(rng, (3, 24, 40), dtype, 40**-0.5)
    packed = [kernels.weight(weight) for weight in (up, down, gate)]
    weights = MlpWeights(
        packed[0], packed[1], "swiglu_clamped", gate=packed[2], limit=LIMIT, alpha=ALPHA
    )
    counts = np.array([20, 0, 30])
    results = []
    for fuses in (True, False):
        kernels.kernels.fuses_mlp = fuses
        results.append(np.full((50, 24), np.nan, dtype))
        kernels.kernels.mlp(x, weights, results[-1], group_rows=counts)
    del kernels.kernels.fuses_mlp
    assert_same_bits(*results)
    want = np.empty((50, 24))
    for group, rows in ((0, slice(0, 20)), (2, slice(20, 50))):
        sums = (wide(x[rows]) @ wide(weight[group]).T for weight in (gate, up))
        want[rows] = formula(*sums) @ wide(down[group]).T
    assert_close(results[0], want, dtype)


def test_it_needs_a_gate(all_kernels, kernels, rng):
    x, weight = normal(rng, (3, 4), np.float32), normal(rng, (4, 4), np.float32)
    message = "activation: expected none, gelu, gelu_tanh or silu without a gate, got 'swiglu_cl"
    with pytest.raises(ValueError, match="^linear: " + message):
        all_kernels.linear(x, weight, activation="swiglu_clamped")
    with pytest.raises(ValueError, match="^mlp: " + message):
        kernels.mlp(x, weight, weight, **CLAMPED)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-39, 1e31, np.inf, np.nan])
@pytest.mark.parametrize("name", ["limit", "alpha"])
def test_numbers_that_it_does_not_take(all_kernels, kernels, rng, name, value):
    x, weight = normal(rng, (3, 4), np.float32), normal(rng, (4, 4), np.float32)
    message = re.escape(f"{name}: expected a number from 1.17549e-38 to 1e+30, got {value:g}")
    with pytest.raises(ValueError, match="^gated_linear: " + message):
        all_kernels.gated_linear(x, weight, weight, **CLAMPED | {name: value})
    with pytest.raises(ValueError, match="^mlp: " + message):
        kernels.mlp(x, weight, weight, gate=weight, **CLAMPED | {name: value})
    all_kernels.gated_linear(x, weight, weight, **CLAMPED | {name: value, "activation": "silu"})
