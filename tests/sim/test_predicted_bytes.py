"""What a prediction by curves must equal: bytes, peaks and chunks of a run, exactly."""

import msgspec
import numpy as np
import pytest

from pympa.costs.device_costs import costs_of
from pympa.model.model import Model
from pympa.plan.comm_volume import comm_volume
from pympa.plan.mesh import Plan, parse_plan
from pympa.session.resources import build_resources
from pympa.sim.resources import virtual_resources
from pympa.sim.world import VirtualWorld
from pympa.spec import DTYPES
from pympa.transport.local import LocalWorld
from support import checks, worlds
from support.draws import draw
from support.lanes import lanes
from support.profiles import profile

SOME_DRAWS, ALL_DRAWS, PARTS = 60, 500, 4


def measured(endpoint, spec, plan, lengths, dtype):
    """Run one real step; return its traffic, its peak and the rows of each expert."""
    rank = build_resources(endpoint, plan, isa=worlds.ISA)
    routing = worlds.record_routing(rank)
    model = Model(spec, rank, DTYPES[dtype])
    model.forward(model.prepare(worlds.batch(lengths, spec.vocabulary)))
    return rank.traffic, rank.arena.peak_bytes, routing


def predicted(endpoint, spec, plan, lengths, dtype, routing):
    costs = costs_of(profile().device, dtype, plan.world)
    rank = virtual_resources(endpoint, plan, costs, isa=worlds.ISA, routing=routing[endpoint.rank])
    model = Model(spec, rank, DTYPES[dtype])
    model.forward(model.prepare(worlds.batch(lengths, spec.vocabulary)))
    return rank.traffic, rank.arena.peak_bytes


def check_prediction(spec, plan, lengths, dtype="float32", *, shares_memory=False):
    world = LocalWorld(plan.world, shares_memory=shares_memory)
    real = world.run(lambda e: measured(e, spec, plan, lengths, dtype))
    routing = [of_rank for _, _, of_rank in real]
    virtual = VirtualWorld(plan.world, profile(shares_memory=shares_memory))
    found = virtual.run(lambda e: predicted(e, spec, plan, lengths, dtype, routing))
    assert found == [(traffic, peak) for traffic, peak, _ in real], str(plan)


@pytest.mark.parametrize("size", lanes([1, 2, 3, 4, 6, 8], [3]))
@pytest.mark.parametrize(
    "spec",
    lanes(
        [
            worlds.DENSE,
            worlds.EXPERTS,
            worlds.ODD_EXPERTS,
            worlds.SLIDING,
            worlds.LATENT,
            worlds.POST_AND_PARALLEL,
            worlds.SINKS,
            worlds.SANDWICH,
        ],
        range(5),
    ),
    ids=[
        "dense",
        "experts",
        "odd experts",
        "windows",
        "latents",
        "post and parallel",
        "sinks",
        "sandwich",
    ],
)
def test_bytes_and_peaks_of_plans(spec, size, all_plans):
    """Bytes sent by each rank to each other and the arena's peak are those of a run, exactly."""
    found = worlds.plans(size, spec)
    for number, plan in enumerate(found if all_plans else worlds.some(found, 12)):
        check_prediction(spec, plan, worlds.LENGTHS, shares_memory=number % 2 == 0)


@pytest.mark.parametrize("part", lanes(range(PARTS), [0]))
def test_bytes_and_peaks_of_random_draws(part, all_plans):
    for number in range(part, ALL_DRAWS if all_plans else SOME_DRAWS, PARTS):
        spec, lengths, plan = draw(number)
        check_prediction(spec, plan, lengths, shares_memory=number % 2 == 0)


def test_chunks_of_rows_are_those_of_a_run():
    """More rows than a CPU's kernels take at a time, and than travel to experts together."""
    check_prediction(worlds.EXPERTS, parse_plan("dp=2,ep=2"), (1300, 1500), "bfloat16")
    check_prediction(worlds.DENSE, parse_plan("tp=2"), (1300,), "bfloat16")


def test_keys_are_read_where_they_are():
    """Reading takes no message of keys, however slow the link."""
    plan, lengths = Plan(cp=4), (37, 20)
    routing = [None] * 4

    def run(shares_memory):
        slow = profile(shares_memory=shares_memory)
        link = msgspec.structs.replace(slow.links[0], bytes_per_second=1e3)
        world = VirtualWorld(4, msgspec.structs.replace(slow, links=(link,)))
        ranks = world.run(lambda e: predicted(e, worlds.DENSE, plan, lengths, "float32", routing))
        volume = comm_volume(worlds.DENSE, plan, lengths, 4, shares_memory=shares_memory)
        assert worlds.by_axis(traffic.sent for traffic, _ in ranks) == volume.sent
        assert worlds.by_axis(traffic.read for traffic, _ in ranks) == volume.read
        return max(world.clocks)

    assert run(True) < 0.6 * run(False)


@pytest.mark.parametrize(("nbytes", "start"), [(1000, 1e-5), (10**6, 5e-5)])
def test_posting_takes_a_rank_its_own_time(nbytes, start):
    def body(endpoint):
        group = checks.transport(endpoint)
        array = np.broadcast_to(np.uint8(0), (nbytes,))
        pending = group.start([(array, 1 - group.index)], [(array, 1 - group.index)])
        posted = endpoint.clock()
        group.wait(pending)
        return posted, endpoint.clock()

    for posted, done in VirtualWorld(2, profile()).run(body):
        assert posted == pytest.approx(start + 2e-6)
        assert done == pytest.approx(posted + 1e-5 + nbytes / 1e9)
