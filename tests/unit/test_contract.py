"""What the contract allows: tolerances, and what chance gives on few rows and on many."""

import numpy as np
import pytest

from pympa.spec import DTYPES, LayerSpec, ModelSpec
from pympa.verify.contract import (
    CHANCE,
    MOST_FACTOR,
    TOLERANCE,
    ReferenceErrors,
    RowErrors,
    broken_limits,
    chance_factor,
    narrowest,
)

BF16 = DTYPES["bfloat16"]


def errors(whole, rows=1, size=1.0):
    """Return errors that are the same in all rows."""
    return RowErrors(np.full(rows, whole * size), np.full(rows, size))


def one_rank(of, width=64):
    return ReferenceErrors((of,), width / 2, "one rank")


def rounding_alone(*draws, width=64):
    return ReferenceErrors(draws, width / 2, "rounding alone", most=MOST_FACTOR)


def test_tolerances_are_the_contract():
    assert TOLERANCE == {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize(
    ("whole", "row", "says"),
    [
        (1e-3, 8e-3, []),
        (1.1e-3, 0.0, ["error 1.10e-03 exceeds 1.00e-03 (the tolerance)"]),
        (0.0, 8.1e-3, ["error 8.10e-03 of row 99 exceeds 8.00e-03 (the tolerance of a row)"]),
        (np.nan, 0.0, ["error nan exceeds 1.00e-03 (the tolerance)",
                       "error nan of row 0 exceeds 8.00e-03 (the tolerance of a row)"]),
        (np.inf, 0.0, ["error inf exceeds 1.00e-03 (the tolerance)",
                       "error inf of row 0 exceeds 8.00e-03 (the tolerance of a row)"]),
    ],
)  # fmt: skip
def test_the_whole_and_the_worst_row(whole, row, says):
    """The last row is too small to count for the whole."""
    found = errors(whole, rows=100)
    found.difference[-1], found.size[-1] = row * 1e-9, 1e-9
    assert broken_limits(found, 1e-3 * (1 + 1e-12)) == says


def test_errors_are_relative():
    truth = np.array([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]])
    run = truth + np.array([[0.0, 0.5], [0.0, 0.0], [0.1, 0.0]])
    found = RowErrors.of(run, truth)
    np.testing.assert_allclose(found.whole, np.sqrt(0.26 / 26))
    np.testing.assert_allclose(found.worst_row, 0.1)
    assert broken_limits(RowErrors.of(run * 0 + 1, truth * 0), 1.0)
    assert not broken_limits(RowErrors.of(run[:0], truth[:0]), 1.0, one_rank(errors(0.0, 0)))


def test_one_bad_row_is_found():
    """A row in ten thousand hides in the whole and not in the worst row."""
    truth = np.random.default_rng(0).standard_normal((10_000, 8))
    run = truth.copy()
    run[77] = run[78]
    assert ["row 77" in text for text in broken_limits(RowErrors.of(run, truth), 2e-2)] == [True]


@pytest.mark.parametrize(
    ("alone", "run", "says"),
    [
        (5e-4, 5.9e-4, []),
        (5e-4, 6.1e-4, ["error 6.10e-04 exceeds 6.00e-04 (1.2 × the error of one rank, 5.00e-04)"]),
        (1e-5, 2.5e-4, []),
        (1e-5, 2.6e-4, ["error 2.60e-04 exceeds 2.50e-04 (a quarter of the tolerance)"]),
        (9e-4, 1.01e-3, ["error 1.01e-03 exceeds 1.00e-03 (the tolerance)"]),
    ],
)
def test_many_rows_stay_within_a_fifth_of_one_rank_or_a_quarter(alone, run, says):
    beside = one_rank(errors(alone, rows=500))
    assert broken_limits(errors(run, rows=500), 1e-3, beside) == says


def test_a_row_is_held_against_its_own():
    """The same error is right in a row that one rank gets as wrong, and not in another."""
    alone = errors(3e-4, rows=500)
    alone.difference[7] = 6e-3
    run = RowErrors(alone.difference, alone.size)
    assert not broken_limits(run, 1e-3, one_rank(alone, width=1024))
    run = RowErrors(np.roll(alone.difference, 1), alone.size)
    (says,) = broken_limits(run, 1e-3, one_rank(alone, width=1024))
    assert says == "error 6.00e-03 of row 8 exceeds 2.00e-03 (a quarter of the tolerance of a row)"


def test_a_row_of_other_experts_is_held_against_the_worst():
    alone = errors(3e-4, rows=500)
    alone.difference[7] = 6e-3
    run = errors(3e-4, rows=500)
    run.difference[8], run.size[8] = 6e-3, 1.1
    assert not broken_limits(run, 1e-3, one_rank(alone, width=1024))


def test_what_rounding_alone_does_is_allowed():
    found, rounding = errors(5e-3, rows=500), errors(4.9e-3, rows=500)
    assert broken_limits(found, 1e-3)
    assert not broken_limits(found, 1e-3, None, rounding_alone(rounding))
    (says,) = broken_limits(errors(6e-3, rows=500), 1e-3, None, rounding_alone(rounding))
    assert says == "error 6.00e-03 exceeds 5.88e-03 (1.2 × the error of rounding alone, 4.90e-03)"


def test_of_several_draws_the_worst_counts():
    """An error that comes from one score may be small by chance in one of them."""
    small, large = errors(1e-3, rows=500), errors(2e-3, rows=500)
    small.difference[3], large.difference[4] = 5e-2, 1e-6
    both = rounding_alone(small, large, width=1024)
    assert both.row(3, 1.0, 1e-3).value == pytest.approx(both.row_factor * 5e-2)
    assert both.row(4, 1.0, 1e-3).value == pytest.approx(both.row_factor * 1e-3)
    assert both.whole().value == pytest.approx(MOST_FACTOR * small.whole)


def test_what_rounding_alone_does_is_allowed_to_plans_as_well():
    run, alone, rounding = (errors(e, rows=500) for e in (4e-4, 1e-4, 3.5e-4))
    (says,) = broken_limits(run, 1e-3, one_rank(alone))
    assert says == "error 4.00e-04 exceeds 2.50e-04 (a quarter of the tolerance)"
    assert not broken_limits(run, 1e-3, one_rank(alone), rounding_alone(rounding))


def test_chance_is_shared_out_over_outputs_and_heads_bound_what_is_known():
    layers = (LayerSpec(heads=2, head_dim=64, mlp_hidden=256),)
    spec = ModelSpec(d_model=128, vocabulary=9, layers=layers)
    found = errors(1e-3, rows=64)
    assert ReferenceErrors.of_rounding([found], spec).freedom == 2
    assert ReferenceErrors.of_one_rank(found, spec).freedom == 64
    factors = [
        ReferenceErrors.of_one_rank(found, spec, CHANCE / n).row_factor for n in (1, 10, 200)
    ]
    assert factors == sorted(factors)
    assert factors[0] < factors[-1]


def test_rounding_excuses_no_lost_row():
    """One row leaves chance all room, so the factor has an end; and so has the error."""
    rounding = rounding_alone(errors(1e-2), width=8)
    assert not broken_limits(errors(7.9e-2), 1e-3, None, rounding)
    assert broken_limits(errors(8.1e-2), 1e-3, None, rounding)
    coarse = rounding_alone(errors(0.5), width=8)
    assert not broken_limits(errors(0.8), 0.1, None, coarse)
    assert len(broken_limits(errors(1.0), 0.1, None, coarse)) == 2


@pytest.mark.parametrize("freedom", [8, 12, 40, 300])
def test_the_factor_is_passed_as_rarely_as_it_says(freedom):
    """Of ratios of two mean squares, drawn; Paulson's approximation may only be too large."""
    rng, draws = np.random.default_rng(freedom), 400_000
    ratios = np.sqrt(rng.chisquare(freedom, draws) / rng.chisquare(freedom, draws))
    beyond = (ratios > chance_factor(freedom, 1e-3)).mean()
    assert beyond < 1.2e-3
    assert freedom < 12 or chance_factor(freedom, 1e-3) == 1.2 or beyond > 0.7e-3


def test_the_factor_ends_at_a_fifth():
    factors = [chance_factor(n, CHANCE) for n in (1, 8, 16, 100, 420, 10**6)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == np.inf
    assert factors[-2:] == [1.2, 1.2]


def test_rows_that_count():
    """Rows of equal error count whole; a row that has nearly all of it counts alone."""
    assert errors(1e-3, rows=300).independent == pytest.approx(300)
    uneven = errors(1e-3, rows=300)
    uneven.difference[0] = 1.0
    assert uneven.independent == pytest.approx(1.0, rel=1e-2)
    assert errors(0.0, rows=3).independent == 0.0


def test_the_narrowest_width():
    layers = (
        LayerSpec(heads=4, head_dim=8, v_head_dim=5, mlp_hidden=24),
        LayerSpec(heads=4, head_dim=8, mlp_hidden=64),
    )
    assert narrowest(ModelSpec(d_model=32, vocabulary=9, layers=layers)) == 20


def rounded(x):
    return x.astype(BF16).astype(np.float64)


def mlps(rng, rows, width=32, parts=2):
    """Return an MLP branch in float64, and as rounded with its last sum whole and in parts."""
    x = rng.standard_normal((rows, width))
    up, down = (rounded(rng.standard_normal((width, width))) for _ in range(2))
    hidden = rounded(np.tanh(rounded(x) @ up.T / np.sqrt(width)))
    pieces = zip(np.split(hidden, parts, 1), np.split(down, parts, 1), strict=True)
    truth = np.tanh(x @ up.T / np.sqrt(width)) @ down.T
    return truth, rounded(hidden @ down.T), rounded(sum(rounded(a @ b.T) for a, b in pieces))


@pytest.mark.parametrize("rows", [1, 3, 8, 200])
def test_a_sum_in_two_parts_is_right(rows):
    """An exact emulation of tp=2 in bfloat16: 1.2 × alone would refuse many of few rows."""
    rng, refused, over = np.random.default_rng(rows), 0, 0
    for _ in range(300):
        truth, whole, parted = mlps(rng, rows)
        alone, run = RowErrors.of(whole, truth), RowErrors.of(parted, truth)
        over += run.whole > 1.2 * alone.whole
        # Judged with a tolerance so small that its quarter allows nothing.
        limits = one_rank(alone, 32)
        refused += run.whole > limits.whole().value
        refused += any(run.by_row[r] > limits.row(r, run.size[r], 1e-3).value for r in range(rows))
    assert refused == 0
    assert over > {1: 60, 3: 60, 8: 60, 200: 0}[rows]


def test_a_running_sum_that_is_rounded_is_wrong():
    """As where blocks of a ring are merged in bfloat16: 200 rows show it."""
    rng, rows, width, parts = np.random.default_rng(0), 200, 32, 16
    for _ in range(50):
        hidden, down = (rounded(rng.standard_normal((n, width))) for n in (rows, width))
        truth, running = hidden @ down.T, np.zeros((rows, width))
        for a, b in zip(np.split(hidden, parts, 1), np.split(down, parts, 1), strict=True):
            running = rounded(running + a @ b.T)
        limit = one_rank(RowErrors.of(rounded(truth), truth), width).whole()
        assert RowErrors.of(running, truth).whole > limit.value
