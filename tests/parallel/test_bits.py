"""pp and dp move activations and split no sum: the bits of one rank, in every dtype."""

import pytest

from pympa.plan.mesh import Plan, parse_plan
from pympa.plan.rules import broken_rule
from support import worlds
from support.lanes import lanes

DTYPES = ["float32", "float16", "bfloat16"]
SPECS = {
    "dense": worlds.DENSE,
    "odd": worlds.ODD,
    "sandwich": worlds.SANDWICH,
    "post, parallel": worlds.POST_AND_PARALLEL,
    "latents": worlds.LATENT,
    "sinks": worlds.SINKS,
}


@pytest.mark.parametrize("dtype", lanes(DTYPES, [2]))
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 31])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_pipeline_equals_one_rank(pp, micro_batches, spec, dtype):
    if pp > len(spec.blocks):
        pp = len(spec.blocks)
    outputs, _ = worlds.run_local(spec, Plan(pp=pp, micro_batches=micro_batches), dtype=dtype)
    worlds.assert_same_bits(outputs, worlds.one_rank(spec, worlds.LENGTHS, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [Plan(dp=3), Plan(dp=2, pp=2), Plan(dp=6)], ids=str)
def test_data_parallel_equals_one_rank(plan, dtype):
    outputs, _ = worlds.run_local(worlds.DENSE, plan, dtype=dtype)
    worlds.assert_same_bits(outputs, worlds.one_rank(worlds.DENSE, worlds.LENGTHS, dtype))


@pytest.mark.parametrize("dtype", lanes(DTYPES, [2]))
def test_token_chunks_across_key_tiles(dtype):
    """Chunks whose ends fall inside, on and across the kernel's key tiles of 512."""
    lengths = (1300,)
    for micro_batches in (2, 3, 13):
        plan = Plan(pp=2, micro_batches=micro_batches)
        outputs, _ = worlds.run_local(worlds.DENSE, plan, lengths, dtype)
        worlds.assert_same_bits(outputs, worlds.one_rank(worlds.DENSE, lengths, dtype))


@pytest.mark.parametrize("dtype", lanes(DTYPES, [2]))
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    "plan",
    ["cp=4", "cp=3,micro_batches=9", "cp=2,pp=2,micro_batches=3", "cp=4,cp_scheme=allgather",
     "cp=4,ulysses=2", "cp=2,dim=2", "cp=2,tp=2,dim=2,dim_algo=gather", "cp=4,balance=contiguous"],
)  # fmt: skip
def test_reading_keys_in_place_changes_neither_bits_nor_bytes(plan, spec, dtype):
    plan = parse_plan(plan)
    if broken_rule(plan, spec, len(worlds.LENGTHS)) is not None:
        pytest.skip("not for this model")
    sent, ranks = worlds.run_local(spec, plan, dtype=dtype)
    for seed in (None, 1, 2):
        read, readers = worlds.run_local(spec, plan, dtype=dtype, seed=seed, shares_memory=True)
        worlds.assert_same_bits(read, sent)
        moved = [r.traffic.sent + r.traffic.read for r in readers]
        assert worlds.by_axis(moved) == worlds.sent_by_axis(ranks)
        assert all(not r.traffic.read for r in ranks)
        in_place = plan.cp_scheme != "allgather" and plan.degree("ring") > 1
        assert all(bool(r.traffic.read) == in_place for r in readers)


@pytest.mark.parametrize("base", [Plan(tp=2), Plan(cp=3)], ids=str)
def test_stages_on_top_of_another_axis_change_no_bit(base):
    alone, _ = worlds.run_local(worlds.DENSE, base, dtype="bfloat16")
    staged = Plan(pp=2, tp=base.tp, cp=base.cp, micro_batches=2)
    outputs, _ = worlds.run_local(worlds.DENSE, staged, dtype="bfloat16", seed=4)
    worlds.assert_same_bits(outputs, alone)
