"""Messages between devices through MPI, on as many ranks as mpirun started."""

import numpy as np
import pytest
from mpi4py import MPI

from pympa.plan.mesh import Plan
from pympa.transport.endpoint import TransportError
from pympa.transport.mpi import MpiEndpoint
from pympa.transport.staged import StagedEndpoint
from support import device_checks, worlds
from support.device_checks import Setup
from support.emulated import EmulatedDevice, Machine
from support.lanes import FULL, lanes

SIZE = MPI.COMM_WORLD.Get_size()
pytestmark = pytest.mark.skipif(
    SIZE > 4, reason="16 emulated devices take minutes on few cores, and pass"
)


def build(timeout_seconds=60.0, piece_bytes=64):
    device = EmulatedDevice(Machine(MPI.COMM_WORLD.Get_rank()), timeout_seconds=timeout_seconds)
    inner = MpiEndpoint(MPI.COMM_WORLD, timeout_seconds=timeout_seconds, sleeps=True)
    return Setup(
        StagedEndpoint(
            inner, device, timeout_seconds=timeout_seconds, sleeps=True, piece_bytes=piece_bytes
        ),
        device,
    )


@pytest.fixture(params=lanes([64, 1 << 16], [0]))
def rank(request):
    made = build(piece_bytes=request.param)
    yield made
    made.endpoint.close()


@pytest.mark.parametrize("check", device_checks.EVERYWHERE)
def test_endpoint(rank, check):
    check(rank)


@FULL
def test_repeats_take_nothing_new():
    made = build()
    device_checks.repeats_take_nothing_new(made)
    made.endpoint.close()


@pytest.mark.parametrize("spec", [worlds.DENSE, worlds.ODD_EXPERTS], ids=["dense", "experts"])
def test_whole_models(rank, spec):
    found = worlds.plans(SIZE, spec)
    for plan in (found[0], found[-1], found[len(found) // 2], Plan(cp=SIZE)):
        device_checks.same_as_on_the_host(rank.endpoint, rank.device, spec, plan, "bfloat16")


def test_first_ranks(rank):
    """Fewer ranks send to each other with the same endpoint while others rest."""
    first = (SIZE + 1) // 2
    if rank.endpoint.rank < first:
        view = rank.endpoint.first(first, sleeps=True)
        device_checks.collectives_deliver(Setup(view, rank.device))
    rank.endpoint.idle_barrier()


def test_a_message_that_never_comes_has_a_deadline():
    if SIZE == 1:
        pytest.skip("needs a rank to wait for")
    made, brief = build(), build(timeout_seconds=0.2)
    other = brief.axis()
    if other.index == 1:
        with pytest.raises(TransportError, match=r"rank 1 waited 0.2 s on cp .* ranks \[0\]"):
            other.wait(other.start([], [(brief.zeros((4,), np.float32), 0)]))
    made.axis().gather_objects(None)
    if other.index == 0:
        other.wait(other.start([(brief.zeros((4,), np.float32), 1)], []))
    if other.index == 1:
        brief.endpoint.poll()


@pytest.mark.parametrize("sizes", [(7, 8), (8, 16), (16, 8), (9, 8), (8, 9)])
def test_a_message_of_another_size(sizes):
    """Even where the difference is a whole piece."""
    if SIZE == 1:
        pytest.skip("needs two ranks")
    made = build()
    group = made.axis()
    if group.index == 0:
        group.start([(made.zeros((sizes[0],), np.float64), 1)], [])
        for _ in range(2000):
            group.poll()
    if group.index == 1:
        with pytest.raises(TransportError, match=r"expected on cp .* bytes from .*; got"):
            group.wait(group.start([], [(made.zeros((sizes[1],), np.float64), 0)]))
