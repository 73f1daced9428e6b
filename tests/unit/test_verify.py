"""The contract itself: what passes, what fails, and the check by samples."""

from importlib import resources

import msgspec
import numpy as np
import pytest

from pympa.model.model import Model
from pympa.model.random_weights import random_weights
from pympa.plan.layout import Layout, Range
from pympa.plan.mesh import Plan, parse_plan
from pympa.session.resources import build_resources
from pympa.spec import DTYPES, LayerSpec, LinearScaling, ModelSpec, Rope
from pympa.transport import Transport
from pympa.transport.endpoint import WORLD
from pympa.transport.local import LocalWorld
from pympa.verify.collect import LOGITS, ROUTING, assemble, collect
from pympa.verify.compare import compare, compare_sampled
from pympa.verify.contract import RowErrors
from pympa.verify.reference import RoundingTo
from support import worlds
from support.lanes import FULL, lanes


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
    with pytest.raises(ValueError, match="twice"):
        assemble(spec, [3], [("output", rows, layout)] * 2, [])


NARROW = LayerSpec(heads=6, kv_heads=2, head_dim=8, mlp_hidden=16)
KINDS = (
    NARROW,
    LayerSpec(heads=4, head_dim=8, mlp_hidden=24, experts=4, top_k=2, gated=True),
    LayerSpec(heads=4, head_dim=6, mlp_hidden=9, norm="layer", activation="silu"),
)
PLAIN = LayerSpec(repeat=2, heads=4, head_dim=8, mlp_hidden=64)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(
    ("width", "layers", "lengths", "plan"),
    [
        (4, (NARROW, NARROW), (7, 2, 1), "tp=4"),
        (4, (NARROW, NARROW), (7, 2, 1), "cp=4"),
        (4, (NARROW, NARROW), (7, 2, 1), "dp=2,cp=2"),
        (4, KINDS, (2,), "tp=4,dp=2,ep=2"),
        (32, (PLAIN,), (1, 1, 1), "tp=2"),
    ],
)
def test_right_runs_of_few_rows_pass(width, layers, lengths, plan, dtype):
    spec = ModelSpec(d_model=width, vocabulary=256, layers=layers)
    outputs, _ = worlds.run_local(spec, parse_plan(plan), lengths, dtype)
    verdict = worlds.judge(spec, outputs, lengths, dtype)
    assert verdict.passed, [str(error) for error in verdict.failed]


# Odd models on the packaged text, with a plan each that a single draw of rounding refused.
ODDITIES = {
    "sums of float32": (
        64, (LayerSpec(repeat=2, heads=1, head_dim=66, v_head_dim=2, mlp_hidden=64, norm="layer",
                       qk_norm="head", gated=True, activation="silu"),), (3,), "float32", "tp=1",
    ),
    "routing": (
        6, (LayerSpec(repeat=5, heads=4, kv_heads=1, head_dim=32, v_head_dim=16, mlp_hidden=100,
                      norm="layer", attention_bias=True, activation="silu", experts=8, top_k=2,
                      renormalize=False, capacity_factor=2.0, capacity_group=2,
                      shared_experts=2),), (8, 5, 1, 13, 8), "bfloat16", "tp=2",
    ),
    "a norm of two numbers": (
        128, (
            LayerSpec(heads=1, head_dim=10, mlp_hidden=100, qk_norm="head", norm="layer", experts=5,
                      activation="gelu",
                      rope=Rope(theta=100.0, scaling=LinearScaling(factor=0.5)), top_k=5,
                      capacity_factor=2.0, capacity_group=1, shared_experts=2, router_skew=1.0),
            LayerSpec(heads=2, kv_heads=1, head_dim=2, v_head_dim=1, mlp_hidden=100, norm="layer",
                      rope=Rope(theta=1e6), experts=4, top_k=4, capacity_factor=0.3,
                      capacity_group=2, shared_experts=2),
            LayerSpec(repeat=5, heads=1, head_dim=2, mlp_hidden=8, qk_norm="head", experts=2,
                      top_k=2, rope=Rope(theta=1e6, scaling=LinearScaling(factor=4.0)),
                      attention_bias=True, activation="silu", capacity_factor=1.25,
                      capacity_group=16),
        ), (2, 64, 100, 8, 8), "float16", "tp=1",
    ),
    "seventy layers": (
        64, (
            LayerSpec(repeat=30, heads=1, head_dim=8, mlp_hidden=100),
            LayerSpec(repeat=10, heads=3, kv_heads=2, head_dim=64, mlp_hidden=100),
            LayerSpec(repeat=30, heads=8, kv_heads=1, head_dim=66, mlp_hidden=5),
        ), (2, 5, 257), "float16", "dim=2,dim_algo=reduce",
    ),
}  # fmt: skip


def packaged_text():
    return (resources.files("pympa") / "bench" / "experiments" / "input.txt").read_bytes()


@pytest.mark.parametrize("name", lanes(ODDITIES, [1, 2]))
def test_right_runs_of_odd_models_pass(name, monkeypatch):
    monkeypatch.setattr(worlds, "TEXT", packaged_text())
    width, layers, lengths, dtype, plan = ODDITIES[name]
    spec = ModelSpec(d_model=width, vocabulary=256, layers=layers)
    outputs, _ = worlds.run_local(spec, parse_plan(plan), lengths, dtype)
    verdict = worlds.judge(spec, outputs, lengths, dtype)
    assert verdict.passed, [str(error) for error in verdict.failed]


def test_draws_of_rounding_differ_and_are_alike():
    """Their errors have the same size and are independent."""
    spec, lengths, kind = worlds.ODD, (300, 200), DTYPES["bfloat16"]
    run = worlds.one_rank(spec, lengths, "bfloat16")
    truth, emulated = (
        worlds.truth(spec, run, lengths, "bfloat16"),
        worlds.emulated(spec, run, lengths, "bfloat16"),
    )
    draws = [emulated(RoundingTo(kind, draw)) for draw in range(3)]
    for name in draws[0].keys() - {LOGITS}:  # of two rows
        sizes = [RowErrors.of(draw[name], truth[name]).whole for draw in draws]
        assert min(sizes) / max(sizes) > 0.8
        apart = RowErrors.of(draws[1][name], draws[2][name]).whole
        assert apart > sizes[1], "they are as far from each other as independent errors are"


def deep(**options):
    layer = LayerSpec(repeat=200, heads=2, head_dim=8, mlp_hidden=8, **options)
    return ModelSpec(d_model=32, vocabulary=256, layers=(layer,))


GATED = {"gated": True, "activation": "silu"}


@pytest.mark.parametrize(
    ("dtype", "lengths", "options"),
    lanes(
        [
            ("float16", (1,), {}),
            ("float16", (1,), GATED),
            ("float16", (7, 2, 1), GATED),
            ("float16", (16,) * 4, GATED),
            ("bfloat16", (1,), {}),
            ("bfloat16", (16,) * 4, {}),
        ],
        [0],
    ),
    ids=str,
)
def test_deep_and_narrow_models_are_judged_by_their_own_rounding(lengths, dtype, options):
    """These amplify rounding by more than √layers, which an emulation of it shows."""
    spec = deep(**options)
    for plan in ("tp=2", "cp=2"):
        outputs, _ = worlds.run_local(spec, parse_plan(plan), lengths, dtype)
        verdict = worlds.judge(spec, outputs, lengths, dtype)
        assert verdict.passed, [str(error) for error in verdict.failed]
        assert all(error.norm <= error.tolerance for error in verdict.errors)
    for name in ("layers.150.attention", LOGITS):
        broken = {key: array.copy() for key, array in outputs.items()}
        broken[name][-1] = np.roll(broken[name][-1], 1)
        failed = worlds.judge(spec, broken, lengths, dtype).failed
        assert [error.name for error in failed] == [name]


@FULL
def test_a_dtype_too_coarse_for_a_model_is_named():
    """Rounding alone moves some rows by more than their own size: nothing can be judged."""
    spec, lengths, kind = deep(**GATED), (16,) * 4, DTYPES["bfloat16"]
    run = worlds.one_rank(spec, lengths, "bfloat16")
    truth = worlds.truth(spec, run, lengths, "bfloat16")
    verdict = compare(spec, kind, run, truth, None, worlds.emulated(spec, run, lengths, "bfloat16"))
    assert "the dtype is too coarse for this model" in str(verdict.failed[0])


def test_the_emulation_rounds_as_runs_do():
    """Its errors are those of a run on one rank, in size."""
    lengths, kind = (300, 200), DTYPES["bfloat16"]
    for spec in (
        worlds.DENSE, worlds.ODD, worlds.ODD_EXPERTS, worlds.SANDWICH, worlds.POST_AND_PARALLEL,
        worlds.LATENT, worlds.SINKS,
    ):  # fmt: skip
        run = worlds.one_rank(spec, lengths, "bfloat16")
        truth = worlds.truth(spec, run, lengths, "bfloat16")
        emulated = worlds.emulated(spec, run, lengths, "bfloat16")(RoundingTo(kind))
        for error in compare(spec, kind, run, truth).errors:
            if not error.name.endswith(ROUTING):
                alone = RowErrors.of(emulated[error.name], truth[error.name]).whole
                assert 0.9 < error.norm / alone < 1.1, error.name


LONG = (300, 290)


def run_sampled(plan, dtype, spec=worlds.ODD):
    ids = worlds.batch(LONG, spec.vocabulary)

    def body(endpoint):
        rank = build_resources(endpoint, plan, isa=worlds.ISA)
        world = Transport(
            endpoint, WORLD, range(endpoint.size), rank.arena, rank.trace, rank.traffic
        )
        model = Model(spec, rank, DTYPES[dtype])
        return collect(model, model.prepare(ids), world, only=1)

    outputs = LocalWorld(plan.world).run(body)[0]
    return outputs, ids[1]


@pytest.mark.parametrize("dtype", lanes(sorted(DTYPES), [0]))
@pytest.mark.parametrize("plan", [Plan(), Plan(cp=3), Plan(tp=2, pp=2), Plan(dp=2)], ids=str)
@pytest.mark.parametrize(
    "spec",
    [worlds.ODD, worlds.ODD_EXPERTS, worlds.SANDWICH, worlds.POST_AND_PARALLEL, worlds.LATENT,
     worlds.SINKS],
    ids=["dense", "experts", "sandwich", "post, parallel", "latents", "sinks"],
)  # fmt: skip
def test_samples(spec, plan, dtype):
    outputs, ids = run_sampled(plan, dtype, spec)
    assert len(outputs["output"]) == LONG[1]
    assert outputs[LOGITS].shape == (1, spec.vocabulary)
    rows = np.array([0, 17, 150, 289])

    def judge(run):
        return compare_sampled(spec, DTYPES[dtype], run, random_weights(spec), ids, rows)

    verdict = judge(outputs)
    assert verdict.passed, verdict.failed
    assert verdict.sampled_rows == 4
    for name in ("layers.0.attention", "layers.1.mlp", "output", LOGITS):
        broken = {key: array.copy() for key, array in outputs.items()}
        broken[name][:] = np.roll(broken[name], 1, axis=1)
        assert name in [error.name for error in judge(broken).failed], name


@pytest.mark.parametrize("name", ["routing", "a norm of two numbers"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_odd_models_pass_by_samples(name, dtype):
    width, layers, _, _, _ = ODDITIES[name]
    spec = ModelSpec(d_model=width, vocabulary=256, layers=layers)
    outputs, ids = run_sampled(parse_plan("cp=2"), dtype, spec)
    rows = np.arange(0, LONG[1], 3)
    verdict = compare_sampled(spec, DTYPES[dtype], outputs, random_weights(spec), ids, rows)
    assert verdict.passed, [str(error) for error in verdict.failed]


def test_verdicts_travel():
    verdict = worlds.judge(worlds.DENSE, worlds.one_rank(worlds.DENSE, worlds.LENGTHS, "float32"))
    assert msgspec.json.decode(msgspec.json.encode(verdict.worst))["name"] == verdict.worst.name
    assert verdict.worst.norm <= verdict.worst.tolerance
