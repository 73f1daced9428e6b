"""The same checks over MPI, on as many ranks as mpirun started."""

import numpy as np
import pytest
from mpi4py import MPI

from pympa.plan.mesh import Plan
from pympa.runtime.arena import Arena
from pympa.runtime.trace import Trace
from pympa.runtime.traffic import Traffic
from pympa.transport import Transport
from pympa.transport.endpoint import TransportError
from pympa.transport.mpi import MpiEndpoint
from support import checks, worlds
from support.lanes import lanes

SIZE = MPI.COMM_WORLD.Get_size()
MOST_PLANS = 20


@pytest.fixture(params=["world", "split", "duplicate", "self"])
def endpoint(request):
    """An endpoint on several communicators; each must behave like the others."""
    world = MPI.COMM_WORLD
    comm = {
        "world": lambda: world.Dup(),
        "split": lambda: world.Split(world.Get_rank() % 2, -world.Get_rank()),
        "duplicate": lambda: world.Dup(),
        "self": lambda: MPI.COMM_SELF.Dup(),
    }[request.param]()
    made = MpiEndpoint(comm, timeout_seconds=60, sleeps=True)
    yield made
    made.close()
    comm.Free()


@pytest.fixture(scope="module")
def world():
    made = MpiEndpoint(MPI.COMM_WORLD, timeout_seconds=60, sleeps=True)
    yield made
    made.close()


@pytest.mark.parametrize("check", checks.EVERYWHERE)
def test_transport(endpoint, check):
    check(endpoint)


@pytest.mark.parametrize(
    "spec", [worlds.DENSE, worlds.ODD, worlds.ODD_EXPERTS], ids=["dense", "odd", "experts"]
)
def test_plans_are_exact(world, spec):
    found = worlds.plans(SIZE, spec)
    for plan in found[:: -(-len(found) // MOST_PLANS)]:
        checks.plan_is_exact(world, spec, plan)


@pytest.mark.parametrize("dtype", lanes(["float32", "float16", "bfloat16"], [2]))
def test_same_bits_and_bytes_as_in_process(world, dtype):
    for spec in (worlds.DENSE, worlds.EXPERTS):
        found = worlds.plans(SIZE, spec)
        for plan in (found[0], found[-1], found[len(found) // 2], Plan(cp=SIZE)):
            checks.same_as_in_process(world, spec, plan, dtype)


@pytest.fixture(scope="module")
def sharing():
    made = MpiEndpoint(MPI.COMM_WORLD, timeout_seconds=60, sleeps=True, shares_memory=True)
    yield made
    made.close()


def test_ranks_of_a_node_read_each_others_memory(sharing, world):
    assert sharing.reaches(range(SIZE))
    assert not world.reaches(range(SIZE))
    arena = Arena()
    transport = Transport(sharing, "cp", range(SIZE), arena, Trace(), Traffic())
    own = arena.empty((3, 5), np.float32, shared=True)
    for turn in range(3):
        transport.wait_for_readers()
        own[:] = 100 * turn + transport.index
        exposure = transport.expose([own], [[(3, 5)]] * SIZE)
        for rank, (seen,) in enumerate(transport.exposed_arrays(exposure)):
            assert (seen == 100 * turn + rank).all()
        transport.end_reading([0] * SIZE)
    transport.wait_for_readers()
    arena.close()


@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16"], [1]))
def test_keys_read_in_place_are_the_keys_sent(sharing, world, dtype):
    plans = [Plan(cp=SIZE), Plan(cp=SIZE, micro_batches=5)]
    if SIZE % 2 == 0:
        plans += [Plan(cp=SIZE // 2, pp=2, micro_batches=3), Plan(cp=SIZE, ulysses=2)]
    for plan in plans:
        read = checks.plan_is_exact(sharing, worlds.DENSE, plan, dtype)
        assert read == checks.plan_is_exact(world, worlds.DENSE, plan, dtype)


def test_token_chunks(world):
    pp = 1 if SIZE % 2 else 2
    plan = Plan(pp=pp, cp=SIZE // pp, micro_batches=5)
    checks.plan_is_exact(world, worlds.DENSE, plan)


def test_a_message_that_never_comes_has_a_deadline(world):
    if SIZE == 1:
        pytest.skip("needs a rank to wait for")
    brief = MpiEndpoint(MPI.COMM_WORLD, timeout_seconds=0.2, sleeps=True)
    if brief.rank == 1:
        group = checks.transport(brief)
        with pytest.raises(TransportError, match=r"rank 1 waited 0.2 s on cp .* ranks \[0\]"):
            group.wait(group.start([], [(np.zeros(1), 0)]))
    checks.transport(world).gather_objects(None)
    if brief.rank == 0:
        group = checks.transport(brief)
        group.wait(group.start([(np.zeros(1), 1)], []))


def test_a_message_of_another_size_is_an_error(world):
    if SIZE == 1:
        pytest.skip("needs two ranks")
    group = checks.transport(world)
    if group.index == 0:
        group.wait(group.start([(np.zeros(1), 1)], []))
    if group.index == 1:
        with pytest.raises(TransportError, match="expected on cp 16 bytes from rank 0; got 8"):
            group.wait(group.start([], [(np.zeros(2), 0)]))
