"""What every endpoint must do; test_local.py runs it on rank threads, mpi/test_mpi.py over MPI."""

from __future__ import annotations

import numpy as np

from pympa.plan.comm_volume import comm_volume
from pympa.plan.mesh import Plan
from pympa.runtime.arena import Arena
from pympa.runtime.trace import Trace
from pympa.runtime.traffic import Traffic
from pympa.spec import DTYPES, ModelSpec
from pympa.transport import Transport
from pympa.transport.endpoint import Endpoint
from pympa.transport.local import LocalWorld
from support import worlds


def transport(endpoint: Endpoint, axis: str = "cp") -> Transport:
    return Transport(endpoint, axis, range(endpoint.size), Arena(), Trace(), Traffic())


def messages_keep_their_order(endpoint: Endpoint) -> None:
    """Several messages to one peer, and other axes in between, arrive as they were sent."""
    ring, other = transport(endpoint, "cp"), transport(endpoint, "tp")
    right, left = (ring.index + 1) % ring.size, (ring.index - 1) % ring.size
    out = [np.full(3 + i, 100 * ring.index + i, np.float32) for i in range(4)]
    got = [np.zeros(3 + i, np.float32) for i in range(4)]
    pending = []
    for i, axis in enumerate((ring, other, ring, other)):
        pending.append(axis.start([(out[i], right)], [(got[i], left)]))
    for i in (3, 1, 0, 2):
        ring.wait(pending[i])
    for i in range(4):
        np.testing.assert_array_equal(got[i], 100 * left + i)


def collectives_deliver(endpoint: Endpoint) -> None:
    """Uneven and empty parts, every root, odd dtypes."""
    group = transport(endpoint)
    size, index = group.size, group.index
    sizes = [(3 * i + 1) % 4 for i in range(size)]
    parts = [np.full(n, i if i == index else -1, DTYPES["bfloat16"]) for i, n in enumerate(sizes)]
    group.all_gather(parts)
    for i, part in enumerate(parts):
        assert (part.astype(int) == i).all()
    received = [np.zeros(2, np.int32) for _ in range(size)]
    group.all_to_all([np.array([index, i], np.int32) for i in range(size)], received)
    assert [r.tolist() for r in received] == [[i, index] for i in range(size)]
    for root in range(size):
        value = np.full(5, index, np.float16)
        group.broadcast(value, root)
        assert (value == root).all()
    counts = group.exchange_counts([np.array([10 * index, i]) for i in range(size)])
    assert [count.tolist() for count in counts] == [[10 * i, index] for i in range(size)]
    assert group.gather_objects({"rank": index}) == [{"rank": i} for i in range(size)]
    at_root = group.gather_objects("x" * index, root=size - 1)
    assert at_root == (["x" * i for i in range(size)] if index == size - 1 else [])


def bytes_are_counted_by_pair(endpoint: Endpoint) -> None:
    """A ring step of 12 bytes counts 12 bytes to the next rank and 12 from the previous.

    What a rank sends itself arrives, and is not traffic.
    """
    traffic = Traffic()
    ring = Transport(endpoint, "cp", range(endpoint.size), Arena(), Trace(), traffic)
    right, left = (ring.index + 1) % ring.size, (ring.index - 1) % ring.size
    got = np.zeros(3, np.float32)
    ring.wait(ring.start([(np.ones(3, np.float32), right)], [(got, left)]))
    assert got.all()
    assert traffic.sent == ({("cp", right): 12} if ring.size > 1 else {})
    assert traffic.received == ({("cp", left): 12} if ring.size > 1 else {})


def plan_is_exact(
    endpoint: Endpoint, spec: ModelSpec, plan: Plan, dtype: str = "float32"
) -> str | None:
    """A plan is within the contract and sends what the formula says; rank 0 returns its bits."""
    outputs, rank = worlds.run_plan(endpoint, spec, plan, worlds.LENGTHS, dtype)
    traffic = transport(endpoint).gather_objects((rank.traffic.sent, rank.traffic.read))
    if outputs is None:
        return None
    verdict = worlds.judge(spec, outputs, worlds.LENGTHS, dtype)
    assert verdict.passed, (str(plan), verdict.failed)
    moved = tuple(worlds.by_axis(of_ranks) for of_ranks in zip(*traffic, strict=True))
    routing = worlds.kept_routing(spec, outputs)
    expected = comm_volume(
        spec, plan, worlds.LENGTHS, DTYPES[dtype].itemsize, routing,
        shares_memory=rank.transports["ring"].shares_memory,
    )  # fmt: skip
    assert moved == expected, str(plan)
    return worlds.digest(outputs)


def times_add_up(endpoint: Endpoint) -> None:
    """Of a step, nothing overlaps that must not, and every counted byte has a flight."""
    size, pp = endpoint.size, 1 if endpoint.size % 2 else 2
    for plan in (Plan(cp=size), Plan(pp=pp, dp=size // pp, micro_batches=3)):
        _, rank = worlds.run_plan(endpoint, worlds.DENSE, plan, worlds.LENGTHS, "float32")
        step = rank.trace.last
        times = step.times()
        edges = [step.start, *(t for s in step.spans for t in (s.start, s.stop)), step.stop]
        assert edges == sorted(edges), "spans follow one another"
        waited = sum(times.waits.values())
        assert 0 < times.compute + waited <= times.step
        counted = {True: rank.traffic.received.copy(), False: rank.traffic.sent.copy()}
        for flight in step.flights:
            assert step.start <= flight.start <= flight.stop <= step.stop
            counted[flight.received][flight.axis, flight.peer] -= flight.nbytes
        assert not any(any(left.values()) for left in counted.values())
        assert 0 <= times.hidden <= times.step - waited
        for overlap in times.overlap.values():
            assert min(overlap.hidden, overlap.exposed) >= 0
            assert overlap.exposed <= waited * (1 + 1e-9)
            assert abs(overlap.in_flight - overlap.hidden - overlap.exposed) < 1e-9


def same_as_in_process(endpoint: Endpoint, spec: ModelSpec, plan: Plan, dtype: str) -> None:
    """This endpoint gives the bits, and counts the bytes, that rank threads do."""
    outputs, rank = worlds.run_plan(endpoint, spec, plan, worlds.LENGTHS, dtype)
    traffic = transport(endpoint).gather_objects((rank.traffic.sent, rank.traffic.received))
    if outputs is None:
        return
    local = LocalWorld(plan.world).run(
        lambda e: worlds.run_plan(e, spec, plan, worlds.LENGTHS, dtype)
    )
    assert local[0][0] is not None
    assert worlds.digest(outputs) == worlds.digest(local[0][0])
    assert traffic == [(r.traffic.sent, r.traffic.received) for _, r in local]


EVERYWHERE = (
    messages_keep_their_order,
    collectives_deliver,
    bytes_are_counted_by_pair,
    times_add_up,
)
