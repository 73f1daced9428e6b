"""What every endpoint between devices must do: test_device_endpoints.py and mpi/ run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pympa import _core
from pympa.kernels.cuda import Accelerator
from pympa.model.model import Model
from pympa.model.resources import RankResources
from pympa.plan.mesh import Plan
from pympa.runtime.arena import Arena
from pympa.runtime.clocks import EventClock
from pympa.runtime.trace import Trace
from pympa.runtime.traffic import Traffic
from pympa.session.resources import build_resources
from pympa.spec import DTYPES, ModelSpec
from pympa.transport import Transport, world_transport
from pympa.transport.device import DeviceEndpoint
from pympa.verify.collect import Outputs, assemble
from support import worlds
from support.emulated import DeviceArray, EmulatedCore, EmulatedDevice, plain


class Setup:
    """A rank with a device: its endpoint, arena and transports."""

    def __init__(self, endpoint: DeviceEndpoint, device: EmulatedDevice) -> None:
        self.endpoint, self.device = endpoint, device
        self.arena = Arena(device=device)
        self.trace = Trace(EventClock(device))

    def axis(self, name: str = "cp") -> Transport:
        ranks = range(self.endpoint.size)
        return Transport(self.endpoint, name, ranks, self.arena, self.trace, Traffic())

    def array(self, host: np.ndarray) -> Any:
        """Return an array of the device with these elements, which a kernel writes in its turn."""
        array, source = self.arena.empty(host.shape, host.dtype), host.copy()
        target = plain(array)
        self.device.enqueue(self.device.compute, lambda: np.copyto(target, source))
        return array

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.array(np.zeros(shape, dtype))


def messages_keep_their_order(rank: Setup) -> None:
    """Several messages to one peer, other axes and arrays of the host in between."""
    ring, other = rank.axis("cp"), rank.axis("tp")
    right, left = (ring.index + 1) % ring.size, (ring.index - 1) % ring.size
    values = [np.full(30 + i, 100 * ring.index + i, np.float32) for i in range(6)]
    out = [value if i % 3 == 2 else rank.array(value) for i, value in enumerate(values)]
    got = [
        np.zeros(30 + i, np.float32) if i % 3 == 2 else rank.zeros((30 + i,), np.float32)
        for i in range(6)
    ]
    pending = []
    for i, axis in enumerate((ring, other, ring, ring, other, ring)):
        pending.append(axis.start([(out[i], right)], [(got[i], left)]))
    for i in (3, 1, 0, 5, 2, 4):
        ring.wait(pending[i])
    for i in range(6):
        result = got[i] if i % 3 == 2 else rank.device.read(got[i])
        np.testing.assert_array_equal(result, 100 * left + i)


def collectives_deliver(rank: Setup) -> None:
    """Uneven and empty parts, every root, odd dtypes, mixed kinds of memory."""
    group, read = rank.axis(), rank.device.read
    size, index = group.size, group.index
    sizes = [(37 * i + 1) % 4 * 50 for i in range(size)]
    for dtype in ("bfloat16", "float16", "int32", "uint8"):
        kind = DTYPES.get(dtype, np.dtype(dtype))
        parts = [
            rank.array(np.full(n, i + 1 if i == index else 0, kind)) for i, n in enumerate(sizes)
        ]
        group.all_gather(parts)
        for i, part in enumerate(parts):
            assert (read(part).astype(int) == i + 1).all()
    received = [rank.zeros((2, 40), np.int32) for _ in range(size)]
    sent = [rank.array(np.array([[index] * 40, [i] * 40], np.int32)) for i in range(size)]
    group.all_to_all(sent, received)
    assert [read(r)[:, 0].tolist() for r in received] == [[i, index] for i in range(size)]
    for root in range(size):
        value = rank.array(np.full(5, index, np.float16))
        group.broadcast(value, root)
        assert (read(value) == root).all()
    counts = group.exchange_counts([np.array([10 * index, i]) for i in range(size)])
    assert [count.tolist() for count in counts] == [[10 * i, index] for i in range(size)]
    assert group.gather_objects({"rank": index}) == [{"rank": i} for i in range(size)]


def kernels_and_messages_take_turns(rank: Setup) -> None:
    """What a kernel wrote is sent, what came is what the next one reads, buffers serve again.

    Nothing but `start` and `wait` orders them, and the host never waits in between.
    """
    device, ring = rank.device, rank.axis()
    right, left = (ring.index + 1) % ring.size, (ring.index - 1) % ring.size
    held, incoming = rank.zeros((70,), np.int64), rank.zeros((70,), np.int64)
    seen = rank.zeros((70,), np.int64)
    here, there, total = plain(held), plain(incoming), plain(seen)
    device.enqueue(device.compute, lambda: np.copyto(here, ring.index))
    for _ in range(2 * ring.size):
        pending = ring.start([(held, right)], [(incoming, left)])
        device.enqueue(device.compute, lambda: np.add(total, here, out=total))
        ring.wait(pending)

        def swap() -> None:
            here[:] = there
            there[:] = -1

        device.enqueue(device.compute, swap)
    assert (device.read(seen) == 2 * sum(range(ring.size))).all()


def own_parts_are_copied_in_turn(rank: Setup) -> None:
    """What a rank sends itself arrives after the kernels before it."""
    group = rank.axis()
    value, got = rank.array(np.arange(9)), rank.zeros((9,), np.int64)
    group.wait(group.start([(value, group.index)], [(got, group.index)]))
    assert rank.device.read(got).tolist() == list(range(9))


def repeats_take_nothing_new(rank: Setup) -> None:
    """300 rounds after the first two use the memory and the events that these took."""
    device, group = rank.device, rank.axis()
    taken = []
    for turn in range(302):
        if turn == 2:
            taken = [device.allocated, device.pinned_bytes, device.events, len(device._streams)]
        with rank.trace.step(), rank.arena.scope():
            parts = [rank.array(np.full(40, i == group.index, np.int32)) for i in range(group.size)]
            group.all_gather(parts)
            group.broadcast(parts[0], 0)
        assert len(rank.trace.last.flights) == (group.size > 1) * (
            2 * (group.size - 1) + (group.size - 1 if group.index == 0 else 1)
        )
    assert taken == [device.allocated, device.pinned_bytes, device.events, len(device._streams)]


class Forgetful(EmulatedDevice):
    """Streams never wait for each other."""

    def wait(self, stream: int, event: int) -> None:
        pass


def missing_waits_show(run: Callable[..., Any]) -> None:
    """The checks would find an endpoint that forgets an event: most orders of streams show it."""
    found = 0
    for seed in range(10):
        try:
            run(3, seed, kernels_and_messages_take_turns, device_class=Forgetful)
        except AssertionError:
            found += 1
    assert found >= 5


EVERYWHERE = (
    messages_keep_their_order,
    collectives_deliver,
    kernels_and_messages_take_turns,
    own_parts_are_copied_in_turn,
)


def run_plan(
    endpoint: DeviceEndpoint, device: EmulatedDevice, spec: ModelSpec, plan: Plan, dtype: str
) -> tuple[Outputs | None, RankResources]:
    """Do what `worlds.run_plan` does on a device; nothing is read before the step is over."""
    accelerator = Accelerator(device, EmulatedCore(_core, device))
    rank = build_resources(endpoint, plan, isa=worlds.ISA, accelerator=accelerator)
    world = world_transport(endpoint)
    model = Model(spec, rank, DTYPES[dtype])
    prepared = model.prepare(worlds.batch(worlds.LENGTHS, spec.vocabulary))
    kept: list[Any] = []

    def probe(name: str, array: Any, layout: Any) -> None:
        if rank.mesh.coordinate("columns") == 0 or name.endswith("routing"):
            copied = device.allocate(array.nbytes).view(array.dtype).reshape(array.shape)
            assert isinstance(copied, DeviceArray)
            if array.size:
                device.copy(copied, array, device.compute)
            kept.append((name, copied, layout))

    logits = model.forward(prepared, probe)
    seen = [(name, device.read(array), layout) for name, array, layout in kept]
    values = [replace(g, values=device.read(g.values)) for g in logits]
    parts = world.gather_objects((seen, values), root=0)
    if endpoint.rank != 0:
        return None, rank
    branches, tables = [s for part, _ in parts for s in part], [g for _, p in parts for g in p]
    return assemble(spec, worlds.LENGTHS, branches, tables), rank


def same_as_on_the_host(
    endpoint: DeviceEndpoint, device: EmulatedDevice, spec: ModelSpec, plan: Plan, dtype: str
) -> None:
    """A plan gives the bits, and counts the bytes, that ranks of the host do."""
    outputs, rank = run_plan(endpoint, device, spec, plan, dtype)
    world = world_transport(endpoint)
    sent = world.gather_objects((rank.traffic.sent, rank.traffic.received))
    step = rank.trace.last
    edges = [step.start, *(t for s in step.spans for t in (s.start, s.stop)), step.stop]
    assert edges == sorted(edges), "spans follow one another"
    for flight in step.flights:
        assert step.start <= flight.start <= flight.stop <= step.stop
    rank.arena.close()
    if outputs is not None:
        expected, ranks = worlds.run_local(spec, plan, dtype=dtype)
        assert worlds.digest(outputs) == worlds.digest(expected), str(plan)
        assert sent == [(r.traffic.sent, r.traffic.received) for r in ranks]
