"""Virtual clocks: a run's bytes and memory, the same time every time, and plain physics."""

import msgspec
import numpy as np
import pytest

from pympa.bench.experiment.description import Size, load_experiment
from pympa.costs.cluster import load_cluster
from pympa.costs.datasheet import DatasheetCosts
from pympa.footprint.rehearsal import rehearse
from pympa.model.model import Model
from pympa.plan.comm_volume import comm_volume
from pympa.plan.mesh import Plan, parse_plan
from pympa.sim.predict import predict
from pympa.sim.resources import virtual_resources
from pympa.sim.world import Slow, VirtualWorld
from pympa.spec import DTYPES
from pympa.transport.endpoint import TransportError
from support import checks, worlds
from support.lanes import lanes

DGX = load_cluster("dgx-h100x2")
LINK = DGX.links[0]
SHARE = LINK.processors / DGX.device.processors


def simulate(spec, plan, lengths=worlds.LENGTHS, dtype="bfloat16", slow=None):
    costs = DatasheetCosts(DGX.device, dtype)
    ids = [np.broadcast_to(np.int32(0), (n,)) for n in lengths]

    def body(endpoint):
        rank = virtual_resources(endpoint, plan, costs, isa=worlds.ISA)
        model = Model(spec, rank, DTYPES[dtype])
        model.forward(model.prepare(ids))
        return rank

    return VirtualWorld(plan.world, DGX, slow).run(body)


@pytest.mark.parametrize("size", lanes([1, 2, 4, 6, 8], [0, 1, 2]))
def test_bytes_are_those_of_the_closed_forms(size):
    """Which are those of every run: see test_plans.py."""
    for plan in worlds.plans(size, worlds.DENSE)[::3]:
        ranks = simulate(worlds.DENSE, plan)
        expected = comm_volume(worlds.DENSE, plan, worlds.LENGTHS, 2).sent
        assert worlds.sent_by_axis(ranks) == expected, str(plan)


@pytest.mark.parametrize("plan", ["cp=4", "tp=2,dim=2", "pp=2,cp=2,micro_batches=3"])
def test_memory_is_that_of_a_rehearsal(plan):
    plan = parse_plan(plan)
    for rank in simulate(worlds.DENSE, plan):
        needed = rehearse(
            worlds.DENSE, plan, rank.mesh.rank, worlds.LENGTHS, DTYPES["bfloat16"], isa=worlds.ISA
        )
        assert rank.arena.peak_bytes == needed


@pytest.mark.parametrize("plan", ["cp=4", "dp=2,ep=2", "tp=4,pp=2,micro_batches=2"])
def test_the_same_every_time(plan):
    plan = parse_plan(plan)
    runs = [[rank.trace.last.times() for rank in simulate(worlds.EXPERTS, plan)] for _ in range(2)]
    assert runs[0] == runs[1]


def exchange(size, nbytes, source, targets):
    """Send from one rank to others at once; return each rank's clock afterwards."""

    def body(endpoint):
        group = checks.transport(endpoint)
        array = np.broadcast_to(np.uint8(0), (nbytes,))
        sends = [(array, t) for t in targets] if group.index == source else []
        receives = [(array, source)] if group.index in targets else []
        group.wait(group.start(sends, receives))
        return endpoint.clock()

    return VirtualWorld(size, DGX).run(body)


def test_a_message_takes_latency_and_bandwidth():
    clocks = exchange(2, 10**9, 0, [1])
    assert clocks[1] == pytest.approx(LINK.latency_seconds + 1e9 / LINK.bytes_per_second)
    far = exchange(9, 10**9, 0, [8])[8]
    link = DGX.links[1]
    assert far == pytest.approx(link.latency_seconds + 1e9 / link.bytes_per_second)


def test_messages_that_share_a_way_share_its_bandwidth():
    clocks = exchange(4, 10**9, 0, [1, 2, 3])
    assert max(clocks) == pytest.approx(LINK.latency_seconds + 3e9 / LINK.bytes_per_second)


def test_everybody_to_everybody_takes_what_each_port_carries():
    def body(endpoint):
        group = checks.transport(endpoint)
        parts = [np.broadcast_to(np.uint8(0), (10**9,)) for _ in range(8)]
        group.all_to_all(parts, parts)
        return endpoint.clock()

    seconds = LINK.latency_seconds + 7e9 / LINK.bytes_per_second
    assert VirtualWorld(8, DGX).run(body) == pytest.approx([seconds] * 8)


def test_links_of_two_levels_are_two_ways():
    def body(endpoint):
        group = checks.transport(endpoint)
        array = np.broadcast_to(np.uint8(0), (10**9,))
        sends = [(array, 1), (array, 8)] if group.index == 0 else []
        group.wait(group.start(sends, [(array, 0)] if group.index in (1, 8) else []))
        return endpoint.clock()

    clocks, far = VirtualWorld(9, DGX).run(body), DGX.links[1]
    assert clocks[1] == pytest.approx(LINK.latency_seconds + 1e9 / LINK.bytes_per_second)
    assert clocks[8] == pytest.approx(far.latency_seconds + 1e9 / far.bytes_per_second)


def test_a_slow_link_slows_what_goes_over_it():
    def step(slow):
        ranks = simulate(worlds.DENSE, Plan(cp=4), (4096,), slow=slow)
        return max(rank.trace.last.times().step for rank in ranks)

    assert step(Slow({}, {(0, 1): 1e6})) > 10 * step(None)
    assert step(Slow({}, {(0, 2): 1e6})) == step(None), "no ring goes from 0 to 2"


@pytest.mark.parametrize(
    ("kernel", "costs"),
    [(1.0, 1 + SHARE), (2.0, 2 + SHARE), (0.5, 1.0), (0.9, 0.9 + SHARE), (0.0, 1.0)],
    ids=["as long", "longer", "much shorter", "shorter", "none"],
)
def test_messages_beside_kernels(kernel, costs):
    """They are hidden, but keep processors from kernels as long as they are under way."""
    seconds = LINK.latency_seconds + 1e9 / LINK.bytes_per_second

    def body(endpoint):
        group = checks.transport(endpoint)
        array = np.broadcast_to(np.uint8(0), (10**9,))
        pending = group.start([(array, 1 - group.index)], [(array, 1 - group.index)])
        endpoint.advance(kernel * seconds)
        group.wait(pending)
        return endpoint.clock()

    assert VirtualWorld(2, DGX).run(body) == pytest.approx([costs * seconds] * 2)
    link = msgspec.structs.replace(LINK, processors=0)
    free = msgspec.structs.replace(DGX, links=(link, *DGX.links[1:]))
    assert VirtualWorld(2, free).run(body) == pytest.approx([max(kernel, 1.0) * seconds] * 2)


def test_a_slow_rank_holds_up_the_ring():
    """It takes 3 times as long in kernels and waits for nobody: messages are no slower.

    Its queries meet a block of keys for longer than the next block travels, so all that it waits is
    what messages keep from its kernels: their share of its processors, for as long as they travel.
    """
    plan, lengths, layer = Plan(cp=4), (16384,), worlds.DENSE.layers[0]
    even = [r.trace.last.times() for r in simulate(worlds.DENSE, plan, lengths)]
    slow = [
        r.trace.last.times() for r in simulate(worlds.DENSE, plan, lengths, slow=Slow({2: 3.0}, {}))
    ]
    keys_bytes = lengths[0] // plan.cp * layer.n_kv_heads * layer.head_dim * 2
    travel = LINK.latency_seconds + 2 * keys_bytes / LINK.bytes_per_second  # values are as large
    held_up = len(worlds.DENSE.blocks) * (plan.cp - 1) * travel * SHARE
    assert slow[2].step == pytest.approx(3 * even[2].compute + held_up)
    assert slow[2].step == max(times.step for times in slow)
    for rank in (0, 1, 3):
        assert slow[rank].compute == pytest.approx(even[rank].compute)
        assert sum(slow[rank].waits.values()) > even[rank].compute, "for the slow rank's kernels"


def test_a_pipeline_without_micro_batches_is_half_empty():
    model = load_experiment("ring-dense").sizes["paper"].model
    size, steps = Size(model=model, batch=4, tokens=4096), []
    for micro_batches in (1, 2, 4):
        plan = Plan(pp=2, micro_batches=micro_batches)
        steps.append(predict(size.model, size.lengths, plan, "bfloat16", DGX).step_seconds)
    np.testing.assert_allclose(steps, np.array([1, 3 / 4, 5 / 8]) * steps[0], rtol=0.03)


def test_deadlock_is_reported():
    def body(endpoint):
        group = checks.transport(endpoint)
        group.wait(group.start([], [(np.zeros(1), 1 - group.index)]))

    with pytest.raises(TransportError, match="deadlock: rank 0 waits on cp; rank 1 waits on cp"):
        VirtualWorld(2, DGX).run(body)


def test_costs_follow_the_data_sheet():
    costs, device = DatasheetCosts(DGX.device, "bfloat16"), DGX.device
    big = costs.linear(8192, 8192, 8192, 0)
    rate = 2 * 8192**3 / big
    assert 0.6 * 989e12 < rate < device.linear_efficiency * 989e12 * 1.001
    assert costs.linear(1, 8192, 8192, 2 * 8192**2) >= 2 * 8192**2 / 3.35e12
    assert costs.memory(0) == device.launch_seconds
    pairs = 8192**2
    full = costs.attention(pairs, pairs, 16, 128, 128, 0)
    assert 4 * pairs * 16 * 128 / full == pytest.approx(648e12)
    causal = costs.attention(pairs // 2, pairs, 16, 128, 128, 0)
    assert 2 * pairs * 16 * 128 / causal == pytest.approx(616e12)


def test_published_sizes_take_seconds():
    experiment = load_experiment("ring-dense-fp16")
    size = experiment.sizes["paper"]
    found = predict(size.model, size.lengths, Plan(cp=16), experiment.dtype, DGX)
    assert 0 < found.waiting_seconds < found.step_seconds
    assert found.peak_bytes < DGX.device.memory_bytes


def test_size_is_a_size():
    size = Size(model=worlds.DENSE, batch=2, tokens=64)
    found = predict(size.model, size.lengths, Plan(cp=2), "bfloat16", DGX)
    assert found.bytes_sent == sum(
        comm_volume(size.model, Plan(cp=2), size.lengths, 2).sent.values()
    )
