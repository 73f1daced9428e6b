"""The contract itself: what passes, what fails, and the check by samples."""

import msgspec
import numpy as np
import pytest

import worlds
from pympa.backend import build_rank
from pympa.collect import LOGITS, assemble, collect
from pympa.layout import Layout, Range
from pympa.mesh import Plan
from pympa.model import Model
from pympa.spec import DTYPES
from pympa.transport import WORLD, Transport
from pympa.transport.local import LocalWorld
from pympa.verify import TOLERANCE, BranchError, branch_error, compare, compare_sampled
from pympa.weights import PhiloxSource


def test_tolerances_are_the_contract():
    assert TOLERANCE == {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize(
    ("norm", "row", "passes"),
    [(1e-3, 8e-3, True), (1.1e-3, 0.0, False), (0.0, 8.1e-3, False), (np.nan, 0.0, False),
     (0.0, np.nan, False), (np.inf, np.inf, False)],
)  # fmt: skip
def test_norm_and_worst_row(norm, row, passes):
    assert BranchError("x", norm, row, 1e-3).within() is passes


@pytest.mark.parametrize(
    ("one_rank", "norm", "passes"),
    [(5e-4, 6e-4, True), (5e-4, 6.1e-4, False), (1e-5, 2.5e-4, True), (1e-5, 2.6e-4, False)],
)
def test_distributed_within_a_fifth_of_one_rank_or_a_quarter(one_rank, norm, passes):
    alone = BranchError("x", one_rank, one_rank, 1e-3)
    assert BranchError("x", norm, norm, 1e-3).within(alone) is passes


def test_branch_error_is_relative():
    truth = np.array([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]])
    run = truth + np.array([[0.0, 0.5], [0.0, 0.0], [0.1, 0.0]])
    error = branch_error("x", run, truth, 1.0)
    np.testing.assert_allclose(error.norm, np.sqrt(0.26 / 26))
    np.testing.assert_allclose(error.worst_row, 0.1)
    truth_zero = branch_error("x", run * 0 + 1, truth * 0, 1.0)
    assert not truth_zero.within()


def test_one_bad_row_is_found():
    """A row in ten thousand hides in the norm and not in the worst row."""
    truth = np.random.default_rng(0).standard_normal((10_000, 8))
    run = truth.copy()
    run[77] = run[78]
    error = branch_error("x", run, truth, 2e-2)
    assert error.norm < 2e-2
    assert not error.within()


def test_tolerance_grows_with_the_root_of_the_layers():
    outputs = worlds.one_rank(worlds.DENSE, worlds.LENGTHS, "float32")
    verdict = compare(
        worlds.DENSE, DTYPES["float32"], outputs,
        worlds.truth(worlds.DENSE, outputs, worlds.LENGTHS, "float32"),
    )  # fmt: skip
    allowed = {error.name: error.tolerance / 2e-6 for error in verdict.errors}
    for layer in range(4):
        np.testing.assert_allclose(allowed[f"layers.{layer}.mlp"], np.sqrt(layer + 1))
    np.testing.assert_allclose([allowed["output"], allowed[LOGITS]], 2.0)


def test_missing_and_doubled_rows():
    spec, layout = worlds.DENSE, Layout((Range(0, 0, 2),))
    rows = np.ones((2, spec.d_model), np.float32)
    outputs = assemble(spec, [3], [("output", rows, layout)], [])
    assert np.isnan(outputs["output"][2]).all()
    assert np.isnan(outputs["layers.0.mlp"]).all()
    with pytest.raises(ValueError, match="came twice"):
        assemble(spec, [3], [("output", rows, layout)] * 2, [])


LONG = (300, 290)


def run_sampled(plan, dtype, spec=worlds.ODD):
    ids = worlds.batch(LONG, spec.vocabulary)

    def body(endpoint):
        rank = build_rank(endpoint, plan, isa=worlds.ISA)
        world = Transport(
            endpoint, WORLD, range(endpoint.size), rank.arena, rank.trace, rank.traffic
        )
        model = Model(spec, rank, DTYPES[dtype])
        return collect(model, model.prepare(ids), world, only=1)

    outputs = LocalWorld(plan.world).run(body)[0]
    return outputs, ids[1]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("plan", [Plan(), Plan(cp=3), Plan(tp=2, pp=2), Plan(dp=2)], ids=str)
@pytest.mark.parametrize("spec", [worlds.ODD, worlds.ODD_EXPERTS], ids=["dense", "experts"])
def test_samples(spec, plan, dtype):
    outputs, ids = run_sampled(plan, dtype, spec)
    assert len(outputs["output"]) == LONG[1]
    assert outputs[LOGITS].shape == (1, spec.vocabulary)
    rows = np.array([0, 17, 150, 289])

    def judge(run):
        return compare_sampled(spec, DTYPES[dtype], run, PhiloxSource(), ids, rows)

    verdict = judge(outputs)
    assert verdict.passed, verdict.failed
    assert verdict.sampled_rows == 4
    for name in ("layers.0.attention", "layers.1.mlp", "output", LOGITS):
        broken = {key: array.copy() for key, array in outputs.items()}
        broken[name][:] = np.roll(broken[name], 1, axis=1)
        assert name in [error.name for error in judge(broken).failed], name


def test_verdicts_travel():
    verdict = worlds.judge(worlds.DENSE, worlds.one_rank(worlds.DENSE, worlds.LENGTHS, "float32"))
    assert msgspec.json.decode(msgspec.json.encode(verdict.worst))["name"] == verdict.worst.name
    assert verdict.worst.norm <= verdict.worst.tolerance
