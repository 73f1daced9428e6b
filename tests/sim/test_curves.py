"""Curves between measured points, and what kernels cost by them."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pympa.costs.calls import AttentionCall, GemmCall
from pympa.costs.curves import Curve
from pympa.costs.device_costs import MeasuredCosts
from pympa.spec import SpecError
from support.profiles import BETWEEN, CACHE_BYTES, CALL, FAR, curve, profile

sizes = st.lists(st.integers(1, 10**6), min_size=2, max_size=5, unique=True).map(sorted)


@given(sizes, sizes, st.floats(0, 1e7), st.floats(0, 1e7))
def test_a_curve_is_exact_where_seconds_are_affine_in_each_size(rows, columns, row, column):
    def seconds(r, c):
        return 1e-6 + 2e-9 * r + 3e-9 * c + 4e-12 * r * c

    found = curve("x", seconds, tuple(rows), tuple(columns)).at(row, column)
    assert found == pytest.approx(seconds(max(row, rows[0]), max(column, columns[0])))


def test_leaving_points_out():
    assert curve("x", lambda n: 1.0 + n, (1, 2, 8, 9)).judged().error == pytest.approx(0)
    kink = Curve(kernel="x", dtype="", ranks=1, sizes=((0, 1, 2, 3),), seconds=(1, 1, 1, 2))
    assert kink.left_out() == pytest.approx([0, 0.5])
    assert kink.judged().worst == 0.5
    both = curve("x", lambda a, b: 1.0 + a * b, (1, 2, 3), (1, 2, 3))
    assert len(both.left_out()) == 6


def test_curves_that_fall_stay_above_nothing():
    falling = Curve(kernel="x", dtype="", ranks=1, sizes=((1, 2),), seconds=(2.0, 1.0))
    assert falling.at(100) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ((2, 1),)}, "sizes: expected ascending numbers"),
        ({"sizes": ((),)}, "sizes: expected ascending numbers"),
        ({"seconds": (1.0,)}, "expected 2 finite numbers of at least 0.* got 1"),
        ({"seconds": (1.0, -1.0)}, "expected 2 finite numbers"),
        ({"seconds": (1.0, float("nan"))}, "expected 2 finite numbers"),
    ],
)
def test_wrong_curves(changes, message):
    good = {"kernel": "x", "dtype": "", "ranks": 1, "sizes": ((1, 2),), "seconds": (1.0, 2.0)}
    with pytest.raises(SpecError, match=message):
        Curve(**(good | changes))


def multiplied(*rows, n=64, k=256, activation="none", gated=False, weight_bytes=0):
    return GemmCall(rows, n, k, activation, gated, 0, weight_bytes)


def test_costs_by_curves():
    costs = MeasuredCosts(profile().device, "float32", 1)
    once = CALL + BETWEEN
    assert costs.linears(multiplied(0)) == pytest.approx(once)
    one = costs.linears(multiplied(100))
    assert one == pytest.approx(once + 1e-11 * 100 * 64 * 256)
    assert costs.linears(multiplied(60, 0, 40)) == pytest.approx(one)
    gated = costs.linears(multiplied(100, activation="silu", gated=True))
    assert gated == pytest.approx(once + 2e-11 * 100 * 64 * 256 + 1e-10 * 100 * 64)
    mlp = costs.mlp(multiplied(100, activation="silu", gated=True), 256)
    assert mlp == pytest.approx(once + 3e-11 * 100 * 64 * 256 + 1e-10 * 100 * 64)
    assert costs.by_rows("copy", 10, 1000) == pytest.approx(once + 1e-10 * 10 * 1000)
    assert costs.by_rows("never measured", 10, 1000) == costs.by_rows("copy", 10, 1000)
    clamped = costs.linears(multiplied(100, activation="swiglu_clamped", gated=True))
    assert clamped == gated, "a function without a curve is as dear as SiLU"


def test_weights_that_no_cache_holds():
    """A quarter of 4/3 of the cache comes from memory, half of twice the cache."""
    costs = MeasuredCosts(profile().device, "float32", 1)
    near = costs.linears(multiplied(1, 1, n=1024, k=1024, weight_bytes=CACHE_BYTES))
    assert near == costs.linears(multiplied(1, 1, n=1024, k=1024))
    for times, far in ((4 / 3, 1 / 4), (2, 1 / 2)):
        call = multiplied(1, 1, n=1024, k=1024, weight_bytes=int(times * CACHE_BYTES))
        assert costs.linears(call) - near == pytest.approx(2 * far * FAR, rel=1e-4)


def attended(q, k, **changes):
    call = AttentionCall(
        np.array(q, np.int64).tobytes(), np.array(k, np.int64).tobytes(),
        causal=True, window=None, heads=6, kv_heads=2, head_dim=32, v_head_dim=32, nbytes=0,
    )  # fmt: skip
    return call._replace(**changes)


def test_attention_by_curves():
    costs = MeasuredCosts(profile().device, "float32", 1)
    once, pair = CALL + BETWEEN, 1e-11 * 32

    def work(**changes):
        return (costs.attend(attended([(0, 0, 1000)], [(0, 0, 1000)], **changes)) - once) / pair

    assert work(causal=False) == pytest.approx(6 * 1000 * 1000)
    assert 6 * 500_000 < work() < 6 * 520_000, "pairs that are seen, and some past the diagonal"
    assert work() < 2 * work(window=500) < 2 * work()
    assert costs.attend(attended([(0, 0, 10)], [(0, 10, 10)])) == pytest.approx(once)
    assert costs.attend(attended([(0, 0, 10)], [(1, 0, 10)])) == pytest.approx(once)
    halves = costs.attend(attended([(0, 0, 500), (0, 500, 500)], [(0, 0, 1000)]))
    assert halves == pytest.approx(once + work() * pair, rel=0.03)


def test_curves_of_as_many_ranks_as_compute():
    several = tuple(curve("call.linear", lambda n=n: n * CALL, ranks=n) for n in (1, 4, 8)) + tuple(
        c for c in profile().device.curves if c.kernel == "between"
    )
    device = msgspec.structs.replace(profile().device, curves=several)
    for ranks, taken in ((1, 1), (2, 4), (4, 4), (5, 8), (99, 8)):
        costs = MeasuredCosts(device, "float32", ranks)
        assert costs.linears(multiplied(0)) == pytest.approx(taken * CALL + BETWEEN)
