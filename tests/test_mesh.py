"""Plans as text, ranks on axes, and refusals that say what would work."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import worlds
from pympa.mesh import (
    AXES,
    Mesh,
    Plan,
    PlanError,
    all_plans,
    broken_rule,
    check_plan,
    family_plan,
    nearest_plans,
    parse_plan,
)
from pympa.spec import LayerSpec, ModelSpec

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
    for family in ("baseline", "ring"):
        plan = family_plan(family, worlds.DENSE, world)
        assert plan.world == world
        assert broken_rule(plan, worlds.DENSE, 4) is None
    if world == 16:
        assert str(family_plan("baseline", worlds.DENSE, 16)) == "tp=8,pp=2"


def test_all_plans_are_all():
    found = list(all_plans(12))
    assert len(found) == len(set(found))
    assert all(math.prod(getattr(p, a) for a in AXES) == 12 for p in found)
    assert len(found) == 75  # 12 = 2·2·3: C(6,4) ways to place the twos, 5 the three


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected key=value"),
        ("tp", "got 'tp'"),
        ("tp=", "got 'tp='"),
        ("tp=2,tp=2", "tp is given twice"),
        ("tp=-2", "at least 1; got '-2'"),
        ("tp=2.5", "at least 1; got '2.5'"),
        ("xp=2", "no axis or option is called 'xp'; use pp, dp, cp, tp"),
        ("balance=odd", "zigzag or contiguous"),
    ],
)
def test_malformed(text, says):
    with pytest.raises(PlanError, match=says):
        parse_plan(text)


@pytest.mark.parametrize(
    ("plan", "spec", "rule"),
    [
        (Plan(pp=8), worlds.DENSE, "pp=8 stages need at least as many layers; the model has 4"),
        (Plan(tp=16), worlds.DENSE, "tp=16 splits whole heads; the model has 8"),
        (Plan(dim=2), worlds.DENSE, "dim=2"),
        (Plan(ep=2, dp=2), worlds.DENSE, "ep=2,etp=1"),
        (Plan(cp=2), worlds.WINDOWED, "balance=contiguous"),
        (Plan(pp=2, micro_batches=9), worlds.NOT_CAUSAL, "needs a causal model"),
    ],
)
def test_rules(plan, spec, rule):
    with pytest.raises(PlanError) as error:
        check_plan(plan, spec, plan.world, 4)
    assert rule in str(error.value)
    for near in nearest_plans(plan, spec, plan.world, 4):
        assert str(near) in str(error.value)
        check_plan(near, spec, plan.world, 4)


def test_experts_are_refused_by_name():
    layer = LayerSpec(heads=2, head_dim=4, mlp_hidden=8, experts=4, top_k=2)
    spec = ModelSpec(d_model=8, vocabulary=8, layers=(layer,))
    with pytest.raises(PlanError, match=r"dense layers only.*no plan of this version"):
        check_plan(Plan(), spec, 1, 1)
