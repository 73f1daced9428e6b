"""Plans as text, ranks on axes, and refusals that say what would work."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pympa.plan.enumerate import degree_choices
from pympa.plan.families import family_plan
from pympa.plan.mesh import AXES, Mesh, Plan, PlanError, parse_plan
from pympa.plan.rules import broken_rule, check_plan, nearest_plans
from support import worlds

degrees = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES})


@given(degrees, st.integers(1, 9), st.sampled_from(["zigzag", "contiguous"]))
def test_text_and_back(sizes, micro_batches, balance):
    plan = Plan(**sizes, micro_batches=micro_batches, balance=balance)
    assert parse_plan(str(plan)) == plan


def test_written_as_the_papers_do():
    assert str(Plan(pp=2, tp=8)) == "tp=8,pp=2"
    assert str(Plan(dp=4, pp=4)) == "pp=4,dp=4"
    assert str(Plan()) == "tp=1"
    assert parse_plan(" pp=2, tp=8 ") == Plan(tp=8, pp=2)


@given(degrees)
def test_groups_partition_the_world(sizes):
    plan = Plan(**sizes)
    for axis in AXES:
        groups = {Mesh(plan, rank).group(axis) for rank in range(plan.world)}
        assert sorted(r for group in groups for r in group) == list(range(plan.world))
        for rank in range(plan.world):
            mesh = Mesh(plan, rank)
            assert mesh.group(axis)[mesh.coordinate(axis)] == rank


def test_dim_is_fastest_and_pp_slowest():
    mesh = Mesh(Plan(pp=2, dp=2, cp=2, tp=2, dim=2), 0)
    assert [mesh.group(axis)[1] for axis in ("dim", "tp", "cp", "dp", "pp")] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("world", range(1, 65))
def test_families_fit_every_world(world):
    for family in ("baseline", "ring", "stages", "stages-tp"):
        plan = family_plan(family, worlds.DENSE, world)
        assert plan.world == world
        assert broken_rule(plan, worlds.DENSE, 4) is None
    if world == 16:
        assert str(family_plan("baseline", worlds.DENSE, 16)) == "tp=8,pp=2"


def test_stages_take_a_rank_for_each_layer():
    """pp: the largest divisor of the ranks that there are layers for; DENSE has 4 and 8 heads."""
    for world, (stages, staged_tp) in {
        1: ("tp=1", "tp=1"), 3: ("pp=3", "pp=3"), 6: ("pp=3,dp=2", "tp=2,pp=3"),
        16: ("pp=4,dp=4", "tp=4,pp=4"), 64: ("pp=4,dp=16", "tp=8,pp=4,dp=2"),
    }.items():  # fmt: skip
        assert str(family_plan("stages", worlds.DENSE, world)) == stages
        assert str(family_plan("stages-tp", worlds.DENSE, world)) == staged_tp


def test_all_plans_are_all():
    found = list(degree_choices(12))
    assert len(found) == len(set(found))
    assert all(math.prod(getattr(p, a) for a in AXES) == 12 for p in found)
    assert len(found) == 75  # 12 = 2·2·3: C(6,4) ways to place the twos, 5 the three


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected key=value"),
        ("tp", "got 'tp'"),
        ("tp=", "got 'tp='"),
        ("tp=2,tp=2", "tp: expected once; got it twice"),
        ("tp=-2", "at least 1; got '-2'"),
        ("tp=2.5", "at least 1; got '2.5'"),
        ("xp=2", "expected axes and options out of pp, dp, cp, tp"),
        ("balance=odd", "zigzag or contiguous"),
    ],
)
def test_malformed(text, says):
    with pytest.raises(PlanError, match=says):
        parse_plan(text)


@pytest.mark.parametrize(
    ("plan", "spec", "rule"),
    [
        (Plan(pp=8), worlds.DENSE, "pp=8: expected at most 4, because each stage needs a layer"),
        (Plan(tp=16), worlds.DENSE, "tp=16: expected at most 8, the fewest heads of a layer"),
        (Plan(dim=9), worlds.DENSE, "dim=9: expected at most"),
        (
            Plan(dim=2, dim_algo="reduce"),
            worlds.ODD,
            "dim_algo=reduce: expected exchange or gather",
        ),
        (Plan(cp=4, ulysses=3), worlds.DENSE, "ulysses=3: expected a divisor of cp=4"),
        (
            Plan(cp=4, tp=3, cp_scheme="ulysses"),
            worlds.DENSE,
            "expected at most 2, the fewest heads of a tp rank",
        ),
        (
            Plan(cp=4, cp_scheme="ulysses", ulysses=2),
            worlds.DENSE,
            "expected ulysses=1 or ulysses=cp=4",
        ),
        (
            Plan(ep=2, dp=2),
            worlds.DENSE,
            "ep=2,etp=1: expected 1, because the model has no experts",
        ),
        (
            Plan(ep=16, dp=16),
            worlds.EXPERTS,
            "ep=16: expected at most 6, the fewest experts of a layer",
        ),
        (Plan(ep=3, dp=4), worlds.EXPERTS, "ep·etp=3·1: expected a divisor of dp·cp·tp·dim=4"),
        (Plan(etp=2, dp=2), worlds.EXPERTS, "etp=2: expected a divisor of tp·dim=1"),
        (
            Plan(etp=21, tp=21),
            worlds.NARROW_EXPERTS,
            "etp=21: expected at most 20, the fewest columns of an expert",
        ),
        (Plan(pp=2, micro_batches=9), worlds.NOT_CAUSAL, "expected a causal model"),
    ],
)
def test_rules(plan, spec, rule):
    with pytest.raises(PlanError) as error:
        check_plan(plan, spec, plan.world, 4)
    assert rule in str(error.value)
    for near in nearest_plans(plan, spec, plan.world, 4):
        assert str(near) in str(error.value)
        check_plan(near, spec, plan.world, 4)


def test_expert_columns():
    """Experts' columns go to the ranks that hold the same rows, if the groups fit beside them."""
    for text, columns in {
        "tp=4": 4, "tp=4,dp=2,ep=2": 4, "tp=4,dp=2,ep=4": 1, "tp=4,ep=2,etp=2": 2, "dp=4,ep=4": 1,
    }.items():  # fmt: skip
        assert parse_plan(text).expert_columns == columns, text


@given(st.sampled_from([p for n in (4, 6, 8, 12) for p in worlds.plans(n, worlds.EXPERTS)]))
def test_expert_groups_cover_a_stage(plan):
    """Each ep group has neighbours of one stage; with the etp groups they cover all ranks."""
    for rank in range(plan.world):
        mesh = Mesh(plan, rank)
        ep, etp = mesh.group("ep"), mesh.group("etp")
        assert (len(ep), len(etp)) == (plan.ep, plan.expert_columns)
        assert ep[mesh.coordinate("ep")] == etp[mesh.coordinate("etp")] == rank
        assert {r // plan.stage_ranks for r in (*ep, *etp)} == {rank // plan.stage_ranks}
        assert set(etp) <= set(mesh.group("columns"))
        assert all(Mesh(plan, other).group("ep") == ep for other in ep)


@given(st.sampled_from([p for n in (4, 6, 8, 12) for p in worlds.plans(n, worlds.DENSE)]))
def test_rings_and_exchanges_make_up_cp(plan):
    for rank in range(plan.world):
        mesh = Mesh(plan, rank)
        ring, exchange, cp = (mesh.group(name) for name in ("ring", "ulysses", "cp"))
        assert len(ring) * len(exchange) == len(cp)
        assert set(ring) & set(exchange) == {rank}
        assert {r for other in ring for r in Mesh(plan, other).group("ulysses")} == set(cp)
