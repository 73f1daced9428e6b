"""`CupyDevice` without a GPU: whole models on CuPy's arrays, over memory of the host."""

import numpy as np
import pytest

from pympa.errors import RefusedError
from pympa.hardware import device_cupy
from pympa.hardware.device_cupy import CupyDevice
from pympa.kernels.cuda import Accelerator
from pympa.plan.mesh import Plan
from pympa.transport.local import LocalWorld
from pympa.transport.staged import StagedEndpoint
from support import worlds
from support.lanes import lanes

pytest.importorskip("cupy")
core = pytest.importorskip(
    "pympa._cuda_emulated", reason="needs a build with PYMPA_CUDA_EMULATED=ON", exc_type=ImportError
)


@pytest.fixture
def cupy_on_host(monkeypatch):
    from support.cupy_on_host import cupy_on_host

    stand_in = cupy_on_host()
    monkeypatch.setattr(device_cupy, "import_cupy", lambda: stand_in)
    return stand_in


def test_device(cupy_on_host):
    device = CupyDevice(3)
    assert (device.index, device.bus_id) == (0, "0000:00:00.0")
    assert device.name == "GPU 0 (memory of the host)"
    array = device.allocate(1 << 12)
    assert array.data.ptr % 256 == 0
    assert device.owns(array)
    assert not device.owns(np.zeros(1))
    values = np.arange(1 << 10, dtype=np.float32)
    device.write(array.view(np.float32), values)
    np.testing.assert_array_equal(device.read(array.view(np.float32)), values)
    with pytest.raises(ValueError, match="copy: expected 4096 bytes; got 8"):
        device.copy(array, np.zeros(8, np.uint8), device.compute)
    assert device.memory() == (1 << 30, 1 << 31)
    device.close()
    runtime = cupy_on_host.cuda.runtime
    assert not runtime.streams
    assert not runtime.events


def test_a_device_that_is_taken_is_refused(cupy_on_host, monkeypatch):
    runtime = cupy_on_host.cuda.runtime

    def taken(device):
        raise runtime.CUDARuntimeError(46)

    monkeypatch.setattr(runtime, "setDevice", taken)
    with pytest.raises(RefusedError, match=r"backend cuda: GPU 0: .*busy or unavailable"):
        CupyDevice(0)


@pytest.mark.parametrize(
    ("spec", "plan"),
    lanes(
        [
            (worlds.DENSE, Plan()),
            (worlds.ODD, Plan(tp=2)),
            (worlds.DENSE, Plan(cp=2, dim=2)),
            (worlds.DENSE, Plan(pp=2, cp=2, ulysses=2, micro_batches=3)),
            (worlds.DENSE, Plan(dim=2, dim_algo="reduce")),
            (worlds.ODD_EXPERTS, Plan(cp=2, ep=2)),
        ],
        [0, 2],
    ),
    ids=lambda value: str(value) if isinstance(value, Plan) else "",
)
def test_whole_models(cupy_on_host, spec, plan):
    from support.cupy_on_host import HostCore

    def body(inner):
        device = CupyDevice(inner.rank, timeout_seconds=60)
        endpoint = StagedEndpoint(inner, device, timeout_seconds=60, sleeps=False, piece_bytes=512)
        outputs, rank = worlds.run_plan(
            endpoint,
            spec,
            plan,
            worlds.LENGTHS,
            "bfloat16",
            accelerator=Accelerator(device, HostCore(core)),
        )
        assert rank.trace.last.times().compute > 0
        endpoint.close()
        rank.arena.close()
        return outputs

    outputs = LocalWorld(plan.world, seed=0).run(body)[0]
    verdict = worlds.judge(spec, outputs, worlds.LENGTHS, "bfloat16")
    assert verdict.passed, verdict.failed
