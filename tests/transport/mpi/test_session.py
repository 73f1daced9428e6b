"""Sessions on as many ranks as mpirun started: what is refused on all together, who rests."""

import functools
import threading
import time

import numpy as np
import pytest
from mpi4py import MPI

from pympa import Session
from pympa.bench.experiment.description import Size
from pympa.bench.experiment.input import input_ids
from pympa.bench.measure import truth
from pympa.errors import RefusedError
from pympa.model.model import Model
from pympa.model.random_weights import random_weights
from pympa.plan.mesh import Plan
from pympa.spec import DTYPES
from support import worlds
from support.lanes import FULL

SIZE = MPI.COMM_WORLD.Get_size()


def test_session_refuses_ranks_that_differ():
    if SIZE == 1:
        pytest.skip("one rank differs from nobody")
    with pytest.raises(RefusedError, match="seed: expected the same on all ranks"), Session() as s:
        s.team.agree("seed", int(s.rank == s.size - 1))


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
        ({"plan": "tp=१"}, "tp: expected a number of at least 1; got '१'"),
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
        session.team.check(functools.partial(local, session.rank))


@pytest.mark.parametrize("ranks", sorted({1, (SIZE + 1) // 2, SIZE}))
def test_first_ranks_work_while_others_rest(ranks):
    """All ranks get what rank 0 got, a refusal as well, and the whole session works afterwards."""

    def work(team):
        team.barrier()
        rank = team.resources(Plan(cp=team.size))
        return rank.mesh.plan.cp, team.world.gather_objects(team.rank), team.oversubscribed

    def refuse(team):
        raise RefusedError("not today")

    with Session() as session:
        size, members, crowded = session.team.on_first(ranks, work)
        assert (size, members) == (ranks, list(range(ranks)))
        assert crowded <= session.team.oversubscribed, "fewer ranks are no larger crowd"
        with pytest.raises(RefusedError, match="not today"):
            session.team.on_first(ranks, refuse)
        assert session.world.gather_objects(session.rank) == list(range(SIZE))


@FULL
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
    job = truth.Job("tiny", "local", size, dtype, ids, random_weights(size.model))

    def judge(team):
        model = Model(worlds.DENSE, team.resources(Plan(cp=team.size)), dtype, job.source)
        return yardstick.judge(team, model, model.prepare(ids))

    with Session(timeout_seconds=2) as session:
        yardstick = truth.Truth(session.team, job)
        for ranks in (SIZE - 1, SIZE):
            verdict, alone = session.team.on_first(ranks, judge)
            assert verdict.passed
            assert alone.passed


def test_session_refuses_a_plan_of_another_size():
    with pytest.raises(RefusedError, match=f"needs {SIZE + 1} ranks; this session has {SIZE}"):
        Session(f"cp={SIZE + 1}").__enter__()
