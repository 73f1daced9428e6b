"""Experts: every plan exact, whole experts anywhere give the same bits, drops follow the rule."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pympa.model.batch import lay_out_batch
from pympa.model.resources import RankResources
from pympa.plan.comm_volume import comm_volume
from pympa.plan.mesh import Mesh, Plan, parse_plan
from pympa.spec import DTYPES, LayerSpec, ModelSpec, SpecError
from pympa.transport.local import LocalWorld
from pympa.verify.reference import kept
from support import checks, worlds
from support.lanes import FULL, lanes
from support.tampering import drop, on_receive, swap_rows


def altered(spec: ModelSpec, **fields) -> ModelSpec:
    """Change the first kind of layer of a model."""
    layers = (msgspec.structs.replace(spec.layers[0], **fields), *spec.layers[1:])
    return msgspec.structs.replace(spec, layers=layers)


@pytest.mark.parametrize("dtype", lanes(["float16", "bfloat16"], [1]))
@pytest.mark.parametrize(
    "plan",
    ["dp=16,ep=4", "cp=6,ep=6", "tp=8,pp=2,ep=2", "tp=4,cp=2,ep=2,etp=2", "tp=4", "tp=2,cp=2,ep=2"],
)
def test_half_precision(plan, dtype):
    plan = parse_plan(plan)
    LocalWorld(plan.world).run(lambda e: checks.plan_is_exact(e, worlds.EXPERTS, plan, dtype))


@pytest.mark.parametrize("dtype", lanes(sorted(DTYPES), [0]))
@pytest.mark.parametrize(
    ("plan", "ep"),
    lanes(
        [("dp=4", 4), ("dp=6", 3), ("cp=4", 2), ("cp=2,dp=3", 6), ("tp=2,dp=2", 2),
         ("pp=2,cp=3", 3), ("tp=2,cp=2,pp=2,micro_batches=9", 2)], [0, 3, 5],
    ),
)  # fmt: skip
@pytest.mark.parametrize("spec", [worlds.EXPERTS, worlds.ODD_EXPERTS], ids=["even", "odd"])
def test_whole_experts_elsewhere_change_no_bit(spec, plan, ep, dtype):
    plan = parse_plan(plan)
    if ep > min(b.experts for b in spec.blocks if b.experts):
        ep = 3
    here, _ = worlds.run_local(spec, plan, dtype=dtype)
    spread = msgspec.structs.replace(plan, ep=ep)
    for seed in (None, 1, 2):
        there, ranks = worlds.run_local(spec, spread, dtype=dtype, seed=seed)
        worlds.assert_same_bits(there, here)
        assert any(axis == "ep" for rank in ranks for axis, _ in rank.traffic.sent)


@pytest.mark.parametrize("dtype", lanes(sorted(DTYPES), [0]))
@pytest.mark.parametrize("plan", ["dp=3,ep=3", "pp=3,micro_batches=5", "dp=2,pp=3,ep=2"])
def test_one_rank_gives_the_same_bits(plan, dtype):
    spec = worlds.ODD_EXPERTS
    outputs, _ = worlds.run_local(spec, parse_plan(plan), dtype=dtype, seed=1)
    worlds.assert_same_bits(outputs, worlds.one_rank(spec, worlds.LENGTHS, dtype))


@pytest.mark.parametrize("top_k", lanes([1, 2, 6], [0, 1]))
@pytest.mark.parametrize("plan", ["dp=4,ep=4", "tp=4,ep=4", "cp=6,ep=6", "tp=4,ep=2,etp=2"])
def test_one_expert_may_take_all(plan, top_k):
    """A gate so skewed that all rows choose the first experts; the last ranks get none."""
    spec = altered(worlds.EXPERTS, router_skew=1000.0, top_k=top_k)
    outputs, ranks = worlds.run_local(spec, parse_plan(plan), seed=5)
    assert worlds.judge(spec, outputs).passed
    rows = sum(rank.load.rows.get(0, np.zeros(6, int)) for rank in ranks)
    assert rows.tolist() == [sum(worlds.LENGTHS)] * top_k + [0] * (6 - top_k)


@pytest.mark.parametrize("plan", ["dp=6,ep=6", "cp=6,ep=3", "tp=8,ep=4", "tp=8,ep=2,etp=4"])
def test_fewer_rows_than_ranks(plan):
    spec, lengths = worlds.EXPERTS, (3, 1)
    outputs, _ = worlds.run_local(spec, parse_plan(plan), lengths, seed=2)
    assert worlds.judge(spec, outputs, lengths).passed


@FULL
def test_rows_travel_in_several_chunks():
    """More rows than travel at once: as many chunks on all ranks, however uneven the rows."""
    lengths, spec = (1200, 30), worlds.EXPERTS
    here, _ = worlds.run_local(spec, Plan(dp=2), lengths)
    there, _ = worlds.run_local(spec, Plan(dp=2, ep=2), lengths, seed=7)
    worlds.assert_same_bits(there, here)
    whole, _ = worlds.run_local(spec, Plan(tp=2, cp=2, ep=4), lengths, seed=8)
    assert worlds.judge(spec, whole, lengths).passed


@pytest.mark.parametrize(
    "plan", ["dp=3,ep=3", "tp=2,cp=3,ep=3", "tp=3,ep=3", "tp=4,ep=3,etp=2,cp=3"]
)
def test_ranks_get_the_rows_they_need(plan):
    """Rows from rank to rank are exactly those that chose an expert there."""
    spec, plan = worlds.EXPERTS, parse_plan(plan)
    outputs, ranks = worlds.run_local(spec, plan)
    slices = plan.tp // plan.expert_columns
    owner = np.repeat(np.arange(plan.ep), 6 // plan.ep)
    wanted: Counter[tuple[int, int]] = Counter()
    meshes = [Mesh(plan, rank) for rank in range(plan.world)]
    for mesh in meshes:
        layout = lay_out_batch(mesh, worlds.batch(worlds.LENGTHS), 1).micro_batches[0].layout
        rows = layout.global_rows(worlds.LENGTHS)
        mine = np.array_split(rows, slices)[mesh.coordinate("tp") // plan.expert_columns]
        for layer in range(len(spec.blocks)):
            for expert in outputs[f"layers.{layer}.routing"][mine].ravel():
                wanted[mesh.rank, mesh.group("ep")[owner[expert]]] += 1
    count_bytes = len(spec.blocks) * (6 // plan.ep) * 8
    row_bytes = spec.d_model * 4
    for rank in ranks:
        source = rank.mesh.rank
        for peer in rank.mesh.group("ep"):
            if peer != source:
                there, back = wanted[source, peer], wanted[peer, source]
                sent = (there + back) * row_bytes + count_bytes
                assert rank.traffic.sent["ep", peer] == sent


@settings(max_examples=20)
@given(
    st.sampled_from(
        [
            "tp=1",
            "cp=3",
            "cp=4,tp=2",
            "dp=2,ep=2",
            "pp=2,micro_batches=31",
            "cp=2,micro_batches=9,balance=contiguous",
        ]
    ),
    st.sampled_from([0.3, 0.75, 1.0, 1.25, 6.0]),
    st.sampled_from([1, 3, 8, 64]),
    st.sampled_from([0.0, 1.0, 5.0]),
)
def test_drops_follow_the_capacity_rule(plan, factor, group, skew):
    """Whatever ranks or micro-batches a group lies on, its experts take the same rows."""
    spec = altered(worlds.EXPERTS, capacity_factor=factor, capacity_group=group, router_skew=skew)
    outputs, ranks = worlds.run_local(spec, parse_plan(plan), seed=3)
    assert worlds.judge(spec, outputs).passed
    for index, chosen in worlds.kept_routing(spec, outputs).items():
        rows = np.bincount(chosen[chosen >= 0], minlength=6)
        assert sum(r.load.rows[index] for r in ranks if index in r.load.rows).tolist() == list(rows)
        assert sum(r.load.dropped[index] for r in ranks) == (chosen < 0).sum()


def test_capacity_by_hand():
    layer = LayerSpec(
        heads=1, head_dim=2, mlp_hidden=4, experts=2, top_k=1, capacity_factor=1.0, capacity_group=4
    )
    chosen = np.array([[0], [0], [0], [1], [1], [1]])
    assert kept(layer, chosen).ravel().tolist() == [True, True, False, True, True, False]


def test_more_ranks_in_a_ring_than_rows_of_a_group():
    spec = altered(worlds.EXPERTS, capacity_factor=0.5, capacity_group=16)
    for plan in (Plan(cp=8), Plan(cp=8, ep=2, balance="contiguous")):
        outputs, _ = worlds.run_local(spec, plan, (37, 9), seed=1)
        assert worlds.judge(spec, outputs, (37, 9)).passed


@pytest.mark.parametrize(
    ("tokens", "group", "micro_batches"), lanes([(10, 3, 2), (1000, 32, 16)], [0])
)
@pytest.mark.parametrize("balance", ["contiguous", "zigzag"])
def test_a_group_that_goes_on_with_another_rank(tokens, group, micro_batches, balance):
    """It lies on one rank in each micro-batch, but on another rank in the next one."""
    layer = LayerSpec(
        heads=4, head_dim=16, mlp_hidden=64, experts=2, top_k=1, capacity_factor=1.0,
        capacity_group=group, router_skew=3.0,
    )  # fmt: skip
    spec = ModelSpec(d_model=64, vocabulary=256, layers=(layer,))
    alone = worlds.kept_routing(spec, worlds.one_rank(spec, (tokens,), "float32"), (tokens,))
    assert (alone[0] < 0).sum() > tokens / 10
    for plan in (
        Plan(cp=2, micro_batches=micro_batches, balance=balance),
        Plan(cp=4, micro_batches=micro_batches, balance=balance),
        Plan(cp=2, ep=2, micro_batches=micro_batches, balance=balance),
    ):
        outputs, ranks = worlds.run_local(spec, plan, (tokens,), seed=2)
        verdict = worlds.judge(spec, outputs, (tokens,))
        assert verdict.passed, verdict.failed
        routing = worlds.kept_routing(spec, outputs, (tokens,))
        assert routing[0].tolist() == alone[0].tolist()
        assert sum(rank.load.dropped[0] for rank in ranks) == (alone[0] < 0).sum()
        sent = comm_volume(spec, plan, (tokens,), DTYPES["float32"].itemsize, routing).sent
        assert worlds.sent_by_axis(ranks) == sent


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("plan", ["tp=1", "dp=2,ep=2"])
def test_a_gate_that_is_not_finite_is_refused(plan, value):
    def alter(rank: RankResources) -> None:
        linear = rank.kernels.linear

        def broken(x, weight, out, **options):
            linear(x, weight, out, **options)
            if out.dtype == np.float32 and out.shape[1] == 5 and rank.mesh.rank == 0:
                out[4, 2] = value

        rank.kernels.linear = broken

    spec = altered(worlds.ODD_EXPERTS, mlp_bias=False)
    with pytest.raises(ValueError, match=r"layers\.0\.router: .* position 4 of sequence 0"):
        worlds.run_local(spec, parse_plan(plan), dtype="bfloat16", alter=alter)


def double_a_row(arrays, before):
    """One row in the place of all others."""
    for array in arrays:
        array[...] = array[:1]


@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16"], [1]))
@pytest.mark.parametrize("tamper", [drop, double_a_row, swap_rows])
@pytest.mark.parametrize("journey", ["there", "back"])
@pytest.mark.parametrize(
    "plan", lanes(["dp=4,ep=2", "cp=4,ep=4", "tp=4,ep=4", "tp=4,ep=2,etp=2"], [0, 3])
)
def test_rows_that_get_lost_are_noticed(plan, journey, tamper, dtype):
    spec, plan = worlds.EXPERTS, parse_plan(plan)

    def alter(rank: RankResources) -> None:
        if rank.mesh.rank == 0:  # counts come first, then rows go there, then back
            on_receive(rank, "ep", 1 if journey == "there" else 2, tamper)

    outputs, _ = worlds.run_local(spec, plan, dtype=dtype, alter=alter)
    assert not worlds.judge(spec, outputs, worlds.LENGTHS, dtype).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("broken", ["other experts", "same expert twice", "out of range", "-1"])
def test_wrong_choices_are_noticed(broken, dtype):
    spec = worlds.EXPERTS
    outputs = {k: v.copy() for k, v in worlds.one_rank(spec, worlds.LENGTHS, dtype).items()}
    chosen = outputs["layers.1.routing"]
    logits = worlds.truth(spec, outputs, worlds.LENGTHS, dtype)["layers.1.routing"]
    chosen[5] = {
        "other experts": np.sort(np.argsort(logits[5])[:2]), "same expert twice": [3, 3],
        "out of range": [2, 6], "-1": [-1, 2],
    }[broken]  # fmt: skip
    verdict = worlds.judge(spec, outputs, worlds.LENGTHS, dtype)
    assert "layers.1.routing" in [error.name for error in verdict.failed]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k: expected 1..6"),
        ({"top_k": 7}, "top_k: expected 1..6"),
        ({"experts": 0}, "need experts"),
        ({"experts": -1}, "at least 0"),
        ({"capacity_factor": 1.0}, "both of them or none"),
        ({"capacity_factor": float("nan"), "capacity_group": 4}, "expected a positive number"),
        ({"router_skew": float("inf")}, "expected a finite number"),
    ],
)
def test_specs_that_make_no_sense(fields, message):
    with pytest.raises(SpecError, match=message):
        altered(worlds.EXPERTS, **fields)
