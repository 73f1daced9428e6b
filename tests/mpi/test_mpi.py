"""The same checks over MPI, on as many ranks as mpirun started."""

import functools
import threading
import time

import numpy as np
import pytest
from mpi4py import MPI

import checks
import worlds
from pympa.arena import Arena
from pympa.bench import truth
from pympa.bench.experiment import Size
from pympa.mesh import Plan
from pympa.model import Model
from pympa.session import RefusedError, Session
from pympa.spec import DTYPES
from pympa.trace import Trace
from pympa.transport import Traffic, Transport, TransportError
from pympa.transport.mpi import MpiEndpoint
from pympa.weights import PhiloxSource, input_ids

pytestmark = pytest.mark.mpi
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
    made = MpiEndpoint(comm, timeout_seconds=60, naps=True)
    yield made
    made.close()
    comm.Free()


@pytest.fixture(scope="module")
def world():
    made = MpiEndpoint(MPI.COMM_WORLD, timeout_seconds=60, naps=True)
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_same_bits_and_bytes_as_in_process(world, dtype):
    for spec in (worlds.DENSE, worlds.EXPERTS):
        found = worlds.plans(SIZE, spec)
        for plan in (found[0], found[-1], found[len(found) // 2], Plan(cp=SIZE)):
            checks.same_as_in_process(world, spec, plan, dtype)


@pytest.fixture(scope="module")
def sharing():
    made = MpiEndpoint(MPI.COMM_WORLD, timeout_seconds=60, naps=True, shares_memory=True)
    yield made
    made.close()


def test_ranks_of_a_node_read_each_others_memory(sharing, world):
    assert sharing.reaches(range(SIZE))
    assert not world.reaches(range(SIZE))
    arena = Arena()
    transport = Transport(sharing, "cp", range(SIZE), arena, Trace(), Traffic())
    own = arena.empty((3, 5), np.float32, shared=True)
    for turn in range(3):
        transport.settle()
        own[:] = 100 * turn + transport.index
        loan = transport.lend([own], [[(3, 5)]] * SIZE)
        for rank, (seen,) in enumerate(transport.views(loan)):
            assert (seen == 100 * turn + rank).all()
        transport.give_back(0, 0)
    transport.settle()
    arena.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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


def test_session_refuses_ranks_that_differ():
    if SIZE == 1:
        pytest.skip("one rank differs from nobody")
    with pytest.raises(RefusedError, match="seed: expected the same on all ranks"), Session() as s:
        s.agree("seed", int(s.rank == s.size - 1))


@pytest.mark.parametrize(
    ("usual", "other", "what"),
    [
        ({"plan": f"cp={SIZE}"}, {"plan": f"cp={SIZE},balance=contiguous"}, "plan"),
        ({"shares_memory": True}, {"shares_memory": False}, "shares_memory"),
        ({"timeout_seconds": 50.0}, {"timeout_seconds": 60.0}, "timeout_seconds"),
        ({"backend": "cpu"}, {"backend": "cuda"}, "backend"),
    ],
    ids=["plan", "memory", "timeout", "backend"],
)
def test_session_refuses_arguments_that_differ(usual, other, what):
    if SIZE == 1:
        pytest.skip("one rank differs from nobody")
    asked = other if MPI.COMM_WORLD.Get_rank() == SIZE - 1 else usual
    with pytest.raises(RefusedError, match=f"{what}: expected the same on all ranks"):
        Session(**asked).__enter__()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"threads": "a"}, r"threads: expected 1 to [\d,]+; got 'a'"),
        ({"threads": 0}, r"threads: expected 1 to [\d,]+; got 0"),
        ({"threads": True}, r"threads: expected 1 to [\d,]+; got True"),
        ({"timeout_seconds": 0}, "timeout_seconds: expected seconds above 0; got 0"),
        ({"timeout_seconds": "1"}, "timeout_seconds: expected seconds above 0; got '1'"),
        ({"plan": "tp=१"}, "tp is a number of at least 1; got '१'"),
        ({"plan": "tp=8 pp=2"}, "expected key=value, as in 'tp=8,pp=2'; got 'tp=8 pp=2'"),
        ({"plan": 4}, "plan: expected a Plan, or text as in 'cp=4,tp=2'; got 4"),
    ],
)
def test_session_refuses_arguments(asked, says):
    with pytest.raises(RefusedError, match=says):
        Session(**asked).__enter__()


def test_a_session_belongs_to_its_thread():
    """Calls of two threads would meet on the ranks in any order: only its own is taken."""
    rng = np.random.default_rng(0)
    lengths = [64]
    with Session(f"cp={SIZE}") as session:
        rows = session.layout(lengths).global_rows(lengths)
        arrays = [rng.standard_normal((64, 2, 8), np.float32) for _ in range(2)]
        expected = [session.ring_attention(*[a[rows]] * 3, lengths=lengths)[0] for a in arrays]
        refused = []

        def call(array):
            for _ in range(20):
                try:
                    session.ring_attention(*[array[rows]] * 3, lengths=lengths)
                except RuntimeError as error:
                    refused.append(str(error))

        threads = [threading.Thread(target=call, args=(array,)) for array in arrays]
        for thread in threads:
            thread.start()
        for _ in range(20):
            for array, right in zip(arrays, expected, strict=True):
                o, _ = session.ring_attention(*[array[rows]] * 3, lengths=lengths)
                assert o.tobytes() == right.tobytes()
        for thread in threads:
            thread.join()
    assert len(refused) == 40
    assert all("session: expected one call at a time" in text for text in refused)


def test_session_refuses_no_communicator():
    with pytest.raises(RefusedError, match="comm: expected a communicator that this rank is in"):
        Session(comm=MPI.COMM_NULL).__enter__()


def test_session_refuses_where_one_rank_objects():
    def local(rank):
        if rank == SIZE - 1:
            raise FileNotFoundError("weights.bin: not on this node")

    with pytest.raises(RefusedError, match=r"weights\.bin: not on this node"), Session() as session:
        session.check(functools.partial(local, session.rank))


@pytest.mark.parametrize("ranks", sorted({1, (SIZE + 1) // 2, SIZE}))
def test_first_ranks_work_while_others_rest(ranks):
    """All ranks get what rank 0 got, a refusal as well, and the whole session works afterwards."""

    def work(team):
        team.barrier()
        rank = team.on(Plan(cp=team.size))
        return rank.mesh.plan.cp, team.world.gather_objects(team.rank), team.oversubscribed

    def refuse(team):
        raise RefusedError("not today")

    with Session() as session:
        size, members, crowded = session.on_first(ranks, work)
        assert (size, members) == (ranks, list(range(ranks)))
        assert crowded <= session.oversubscribed, "fewer ranks are no larger crowd"
        with pytest.raises(RefusedError, match="not today"):
            session.on_first(ranks, refuse)
        assert session.world.gather_objects(session.rank) == list(range(SIZE))


def test_verification_may_take_longer_than_a_message(monkeypatch):
    """Ranks rest while rank 0 compares, those that have no part in the plan as well."""
    if SIZE != 4:
        pytest.skip("sleeps for seconds: once is enough")

    def compare(*arguments):
        time.sleep(2.5)
        return compare_at_once(*arguments)

    compare_at_once = truth.compare
    monkeypatch.setattr(truth, "compare", compare)
    lengths, dtype = worlds.LENGTHS, DTYPES["float32"]
    size = Size(model=worlds.DENSE, batch=len(lengths), tokens=lengths)
    ids = tuple(np.split(input_ids(worlds.TEXT, sum(lengths)), np.cumsum(lengths)[:-1]))
    job = truth.Job("tiny", "local", size, dtype, ids, PhiloxSource())

    def judge(team):
        model = Model(worlds.DENSE, team.on(Plan(cp=team.size)), dtype, job.source)
        return yardstick.judge(team, model, model.prepare(ids))

    with Session(timeout_seconds=2) as session:
        yardstick = truth.Truth(session, job)
        for ranks in (SIZE - 1, SIZE):
            verdict, alone = session.on_first(ranks, judge)
            assert verdict.passed
            assert alone.passed


def test_session_refuses_a_plan_of_another_size():
    with pytest.raises(RefusedError, match=f"takes {SIZE + 1} ranks; this session has {SIZE}"):
        Session(f"cp={SIZE + 1}").__enter__()


def test_a_message_that_never_comes_has_a_deadline(world):
    if SIZE == 1:
        pytest.skip("needs a rank to wait for")
    brief = MpiEndpoint(MPI.COMM_WORLD, timeout_seconds=0.2, naps=True)
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
