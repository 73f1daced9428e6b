"""A session on emulated GPUs, on as many ranks as mpirun started."""

import numpy as np
import pytest
from mpi4py import MPI

from pympa import Session
from pympa.errors import RefusedError
from pympa.kernels.cuda import Accelerator
from pympa.spec import DTYPES
from support import worlds
from support.compare import assert_close, assert_lse_close
from support.emulated import EmulatedCore, EmulatedDevice, Machine
from support.oracles import batch_attention

pytestmark = pytest.mark.skipif(
    MPI.COMM_WORLD.Get_size() > 4, reason="kernels of many ranks take minutes to emulate"
)
core = pytest.importorskip(
    "pympa._cuda_emulated", reason="needs a build with PYMPA_CUDA_EMULATED=ON", exc_type=ImportError
)


def accelerator(comm=MPI.COMM_WORLD):
    device = EmulatedDevice(Machine(comm.Get_rank()))
    return Accelerator(device, EmulatedCore(core, device))


def ring(comm, arrays):
    """Return this rank's rows, o and lse; a session of all ranks, or of one."""
    ours = accelerator(comm)
    with Session(comm=comm, backend="cuda", device_transport="staged", accelerator=ours) as session:
        assert session.team.backend == "cuda"
        rows = session.layout(worlds.LENGTHS).global_rows(worlds.LENGTHS)
        on_device = []
        for array in arrays:
            part = np.ascontiguousarray(array[rows])
            there = ours.device.allocate(part.nbytes).view(part.dtype).reshape(part.shape)
            ours.device.write(there, part)
            on_device.append(there)
        results = session.ring_attention(*on_device, lengths=worlds.LENGTHS)
        return rows, *(ours.device.read(array).astype(np.float32) for array in results)


def test_ring_attention():
    rng = np.random.default_rng(0)
    kind = DTYPES["float16"]
    arrays = [rng.standard_normal((sum(worlds.LENGTHS), 4, 24)).astype(kind) for _ in range(3)]
    want, want_lse = batch_attention(*arrays, worlds.LENGTHS)
    for comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
        rows, o, lse = ring(comm, arrays)
        assert_close(o, want[rows], kind)
        assert_lse_close(lse, want_lse[rows], kind)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"backend": "gpu"}, "backend: expected cpu or cuda; got 'gpu'"),
        ({"accelerator": object()}, "accelerator: expected none with backend cpu; got one"),
        ({"backend": "cuda", "threads": 2}, "threads: expected 1 with backend cuda; got 2"),
        (
            {"backend": "cuda", "device_transport": "mpi"},
            "device_transport: expected one of auto, nccl, staged; got 'mpi'",
        ),
    ],
    ids=["backend", "accelerator", "threads", "transport"],
)
def test_arguments_are_refused_on_all_ranks_together(how, message):
    with pytest.raises(RefusedError, match=message), Session(comm=MPI.COMM_WORLD, **how):
        pass


def test_nccl_is_refused_where_it_is_not():
    with (
        pytest.raises(RefusedError, match=r"transport nccl: rank 0: .*; use --device-transport"),
        Session(
            comm=MPI.COMM_WORLD,
            backend="cuda",
            device_transport="nccl",
            accelerator=accelerator(),
        ),
    ):
        pass
