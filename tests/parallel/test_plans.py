"""Every plan of up to 16 ranks, and random models on random plans: exact, and bytes foretold."""

import pytest

from pympa.plan.comm_volume import comm_volume
from pympa.plan.mesh import parse_plan
from pympa.plan.rules import broken_rule
from pympa.spec import DTYPES
from pympa.transport.local import LocalWorld
from support import checks, worlds
from support.draws import draw
from support.lanes import lanes

SOME_PLANS = 25  # of each number of ranks, without --all-plans
SOME_DRAWS, ALL_DRAWS = 10, 2000  # SOME of each hundred


@pytest.mark.parametrize("size", lanes([*range(1, 9), 12, 16], [1, 3]))
@pytest.mark.parametrize("spec", [worlds.DENSE, worlds.EXPERTS], ids=["dense", "experts"])
def test_every_plan_is_exact(spec, size, all_plans):
    found = worlds.plans(size, spec)
    assert found
    for number, plan in enumerate(found if all_plans else worlds.some(found, SOME_PLANS)):
        assert parse_plan(str(plan)) == plan
        seed = number if number % 2 else None
        LocalWorld(size, seed=seed).run(lambda e, p=plan: checks.plan_is_exact(e, spec, p))


@pytest.mark.parametrize("size", lanes([1, 2, 3, 5, 6, 8], [2]))
@pytest.mark.parametrize("spec", [worlds.ODD, worlds.ODD_EXPERTS, worlds.SLIDING, worlds.SANDWICH,
                                  worlds.POST_AND_PARALLEL, worlds.LATENT, worlds.SINKS],
                         ids=["odd", "odd experts", "windows", "sandwich", "post and parallel",
                              "latent", "sinks"])  # fmt: skip
def test_odd_models(spec, size):
    found = worlds.plans(size, spec)
    for number, plan in enumerate(worlds.some(found, SOME_PLANS)):
        LocalWorld(size, seed=number).run(lambda e, p=plan: checks.plan_is_exact(e, spec, p))


@pytest.mark.parametrize("hundred", lanes(range(ALL_DRAWS // 100), [0, 7]))
def test_random_draws(hundred, all_plans):
    count = 100 if all_plans else SOME_DRAWS
    for number in range(100 * hundred, 100 * hundred + count):
        spec, lengths, plan = draw(number)
        dtype = sorted(DTYPES)[number % 3]
        assert broken_rule(plan, spec, len(lengths)) is None
        shares_memory = number % 2 == 0
        outputs, ranks = worlds.run_local(
            spec, plan, lengths, dtype, seed=number, shares_memory=shares_memory
        )
        verdict = worlds.judge(spec, outputs, lengths, dtype)
        assert verdict.passed, (number, str(plan), [str(error) for error in verdict.failed])
        moved = worlds.sent_by_axis(ranks), worlds.by_axis(rank.traffic.read for rank in ranks)
        routing = worlds.kept_routing(spec, outputs, lengths)
        assert moved == comm_volume(
            spec, plan, lengths, DTYPES[dtype].itemsize, routing, shares_memory=shares_memory
        ), (number, str(plan))


@pytest.mark.parametrize("spec", [worlds.DENSE, worlds.EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("algorithm", lanes(["exchange", "gather", "reduce"], [0]))
def test_five_axes_at_once(spec, algorithm):
    text = f"pp=2,dp=2,cp=2,tp=2,dim=2,dim_algo={algorithm},micro_batches=2"
    plan = parse_plan(f"{text},ep=2" if spec.has_experts else text)
    LocalWorld(32, seed=1).run(lambda e: checks.plan_is_exact(e, spec, plan))
