"""The choice of experts: against plain NumPy, ties, groups, and the bits of a row."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa.spec import Routing
from support.compare import assert_each_close, normal
from support.oracles import Choice, plain_select

examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LARGEST = Routing()
DEEPSEEK_2 = Routing(groups=4, top_groups=2, scale=16.0)
DEEPSEEK_3 = Routing(
    score="sigmoid", choice_bias=True, groups=4, top_groups=2, group_score="top2", scale=2.5
)
ROUTINGS = {
    "largest": LARGEST,
    "scaled": Routing(scale=2.5),
    "all groups": Routing(groups=4),
    "groups": DEEPSEEK_2,
    "top2": Routing(groups=4, top_groups=3, group_score="top2"),
    "biased": Routing(choice_bias=True),
    "sigmoid": Routing(score="sigmoid"),
    "one group": Routing(score="sigmoid", groups=4, top_groups=1),
    "biased groups": DEEPSEEK_3,
}


@pytest.fixture
def kernels(all_kernels):
    return all_kernels


def select(
    kernels, logits, choices, routing=LARGEST, bias=None, *, renormalize=False, threads=1
):  # fmt: skip
    experts = np.full((len(logits), choices), -7, np.int32)
    weights = np.full((len(logits), choices), np.nan, np.float32)
    rule = (routing.score, routing.groups, routing.chosen_groups, routing.group_score)
    broken = kernels.core.select_experts(
        logits, experts, weights, renormalize, *rule, routing.scale, bias, kernels.on(threads)
    )
    return Choice(experts, weights, broken)


def assert_same_choice(got, want):
    assert got.broken == want.broken
    np.testing.assert_array_equal(got.experts, want.experts)
    assert_each_close(got.weights, want.weights, np.float32)


def bias_of(routing, rng, count):
    """Return a bias that changes choices, as a slice of more, or None."""
    return normal(rng, count + 2, np.float32, 0.2)[1:-1] if routing.choice_bias else None


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("rows", "count", "choices"),
    [(1, 1, 1), (5, 8, 2), (33, 17, 17), (40, 64, 6), (3, 257, 20), (0, 8, 2), (9, 3, 1)],
)
def test_largest_logits(kernels, rng, rows, count, choices, renormalize):
    wide_logits = rng.standard_normal((rows, count + 5)).astype(np.float32) * 4
    logits = wide_logits[:, 2 : 2 + count]
    chosen = select(kernels, logits, choices, renormalize=renormalize)
    assert_same_choice(chosen, plain_select(logits, choices, LARGEST, renormalize=renormalize))
    if renormalize:  # as large as their sum, so each may be off by half as much
        assert_each_close(2 * chosen.weights.sum(axis=1) - 1, np.ones(rows), np.float32)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(
    ("rows", "count", "choices"),
    [(1, 8, 1), (5, 8, 2), (33, 20, 5), (40, 64, 6), (17, 256, 8), (3, 516, 20), (0, 8, 2)],
)
def test_every_routing(kernels, rng, name, rows, count, choices, renormalize):
    routing, wide_logits = ROUTINGS[name], normal(rng, (rows, count + 5), np.float32, 2.0)
    logits, bias = wide_logits[:, 2 : 2 + count], bias_of(routing, rng, count)
    options = {"renormalize": renormalize}
    chosen = select(kernels, logits, choices, routing, bias, **options)
    assert_same_choice(chosen, plain_select(logits, choices, routing, bias, **options))


def test_routings_choose_otherwise(rng):
    """The formulas above are not all the same."""
    logits, bias = normal(rng, (99, 64), np.float32, 2.0), normal(rng, 64, np.float32, 0.2)
    chosen = {
        plain_select(logits, 6, r, bias if r.choice_bias else None).experts.tobytes()
        for r in ROUTINGS.values()
    }
    # Scales, all groups and sigmoids without a bias change no choice.
    assert len(chosen) == len(ROUTINGS) - 3


@examples
@given(st.data(), st.integers(1, 40), st.integers(0, 12))
def test_ties_go_to_the_lower_id(kernels, data, count, rows):
    choices = data.draw(st.integers(1, count))
    logits = tied_logits(data, rows, count, [-2.0, -0.0, 0.0, 1.5])
    assert_same_choice(select(kernels, logits, choices), plain_select(logits, choices, LARGEST))


@examples
@given(
    st.data(), st.integers(1, 6), st.integers(2, 9), st.integers(0, 9),
    st.sampled_from(["softmax", "sigmoid"]), st.sampled_from(["largest", "top2"]),
)  # fmt: skip
def test_ties_go_to_the_lower_group(kernels, data, groups, size, rows, score, group_score):
    top_groups = data.draw(st.integers(1, groups))
    choices = data.draw(st.integers(1, size * top_groups))
    routing = Routing(score=score, groups=groups, top_groups=top_groups, group_score=group_score)
    # Sums of two of these scores are the same only where both numbers are.
    logits = tied_logits(data, rows, groups * size, [-1.0, 0.0, 2.0])
    assert_same_choice(
        select(kernels, logits, choices, routing), plain_select(logits, choices, routing)
    )


def tied_logits(data, rows, count, values):
    row = st.lists(st.sampled_from(values), min_size=count, max_size=count)
    drawn = data.draw(st.lists(row, min_size=rows, max_size=rows))
    return np.array(drawn, np.float32).reshape(rows, count)


def test_a_bias_breaks_ties(kernels):
    routing = Routing(score="sigmoid", choice_bias=True)
    bias = np.array([0, 0.25, 0, 0.25, 0.25, 0], np.float32)
    chosen = select(kernels, np.zeros((3, 6), np.float32), 2, routing, bias)
    np.testing.assert_array_equal(chosen.experts, [[1, 3]] * 3)
    assert (chosen.weights == 0.5).all(), "a bias is no part of a weight"


def test_select_is_safe_at_the_ends_of_float32(kernels):
    logits = np.array([[3e38, -3e38, 3e38], [-3e38, -3e38, -3.1e38], [0, 100, -100]], np.float32)
    experts, weights, broken = select(kernels, logits, 2)
    assert broken == -1
    np.testing.assert_array_equal(experts, [[0, 2], [0, 1], [0, 1]])
    assert 0 <= weights[2, 0] < 1e-40, "the exponential of -100, or nothing"
    weights[2, 0] = 0
    np.testing.assert_array_equal(weights, [[0.5, 0.5], [0.5, 0.5], [0, 1]])


@pytest.mark.parametrize("renormalize", [False, True])
def test_chosen_experts_that_have_no_score(kernels, renormalize):
    """A bias may choose what the softmax leaves nothing of, or sigmoids that vanish."""
    logits = np.array([[300, 1, 0, -1]], np.float32)
    bias = np.array([0, 9, 9, 0], np.float32)
    for routing in (Routing(choice_bias=True), Routing(choice_bias=True, scale=2.0)):
        chosen = select(kernels, logits, 2, routing, bias, renormalize=renormalize)
        np.testing.assert_array_equal(chosen.experts, [[1, 2]])
        share = 1 / (1 + np.exp(-1))
        want = [[share, 1 - share]] if renormalize else [[0, 0]]
        assert_each_close(chosen.weights, routing.scale * np.array(want), np.float32)
    sigmoid = Routing(score="sigmoid")
    chosen = select(kernels, np.full((1, 4), -1e4, np.float32), 2, sigmoid, renormalize=renormalize)
    np.testing.assert_array_equal(chosen.experts, [[0, 1]])
    np.testing.assert_array_equal(chosen.weights, [[0, 0]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("routing", [LARGEST, DEEPSEEK_2, DEEPSEEK_3])
def test_logits_that_are_not_finite_are_reported(kernels, rng, value, threads, routing):
    logits = rng.standard_normal((30, 40)).astype(np.float32)
    bias = bias_of(routing, rng, 40)
    whole = select(kernels, logits, 3, routing, bias).experts
    logits[17, 36] = logits[11, 0] = logits[29, 20] = value
    chosen = select(kernels, logits, 3, routing, bias, renormalize=True, threads=threads)
    assert chosen.broken == 11
    hit = [11, 17, 29]
    np.testing.assert_array_equal(chosen.experts[hit], [[0, 1, 2]] * 3)
    assert not chosen.weights[hit].any()
    np.testing.assert_array_equal(np.delete(chosen.experts, hit, 0), np.delete(whole, hit, 0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_bias_breaks_every_row(kernels, rng, value):
    bias = bias_of(DEEPSEEK_3, rng, 40)
    bias[39] = value
    chosen = select(kernels, normal(rng, (9, 40), np.float32), 3, DEEPSEEK_3, bias, threads=2)
    assert chosen.broken == 0
    np.testing.assert_array_equal(chosen.experts, [[0, 1, 2]] * 9)
    assert not chosen.weights.any()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_selection_of_a_row_depends_on_that_row_only(kernels, rng, name, renormalize):
    routing, logits = ROUTINGS[name], normal(rng, (29, 60), np.float32)
    bias, options = bias_of(routing, rng, 60), {"renormalize": renormalize}
    whole = select(kernels, logits, 5, routing, bias, **options)
    for threads, rows in ((2, slice(0, 29)), (3, slice(4, 17)), (1, slice(28, 29))):
        part = select(kernels, logits[rows], 5, routing, bias, threads=threads, **options)
        assert part.experts.tobytes() == whole.experts[rows].tobytes()
        assert part.weights.tobytes() == whole.weights[rows].tobytes()


def test_as_a_model_calls_it(cpu_kernels, rng):
    logits, bias = normal(rng, (9, 16), np.float32), normal(rng, 16, np.float32)
    experts, weights = np.empty((9, 3), np.int32), np.empty((9, 3), np.float32)
    ours = cpu_kernels.kernels
    for routing, own in ((LARGEST, None), (DEEPSEEK_2, None), (DEEPSEEK_3, bias)):
        broken = ours.select_experts(
            logits, experts, weights, renormalize=True, routing=routing, choice_bias=own
        )
        want = plain_select(logits, 3, routing, own, renormalize=True)
        assert_same_choice(Choice(experts, weights, broken), want)
    for routing, own, message in (
        (LARGEST, bias, "expected None with routing.choice_bias = False; got an array"),
        (DEEPSEEK_3, None, "expected an array with routing.choice_bias = True; got None"),
    ):
        with pytest.raises(ValueError, match="^select_experts: choice_bias: " + message):
            ours.select_experts(
                logits, experts, weights, renormalize=True, routing=routing, choice_bias=own
            )
