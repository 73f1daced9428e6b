"""Devices without one: memory, streams, events, the clock of events, CuPy's arrays, refusals."""

import subprocess
import sys

import numpy as np
import pytest

from pympa.errors import RefusedError
from pympa.hardware.device import flat_bytes, local_index
from pympa.runtime.arena import DEVICE_ALIGNMENT_BYTES, Arena
from pympa.runtime.clocks import EventClock
from pympa.runtime.trace import Trace
from pympa.spec import DTYPES
from pympa.transport.choice import Choice, Offer, choose
from pympa.transport.endpoint import Message
from support.emulated import DeviceArray, EmulatedDevice, Machine, plain


@pytest.mark.parametrize("size", [0, 1, 1000, (4 << 20) + 5])
def test_read_and_write(size):
    """What is written is read again, in pieces if need be."""
    device = EmulatedDevice()
    array = Arena(device=device).empty((size,), np.uint8)
    values = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    device.write(array, values)
    np.testing.assert_array_equal(device.read(array), values)
    with pytest.raises(ValueError, match="write: expected uint8"):
        device.write(array, values.astype(np.float32))


@pytest.mark.parametrize("seed", range(5))
def test_reading_waits_for_kernels(seed):
    device = EmulatedDevice(Machine(seed))
    array = Arena(device=device).empty((5,), np.float32)
    device.enqueue(device.compute, lambda: np.copyto(plain(array), 7))
    assert device.read(array).tolist() == [7] * 5


def test_the_host_waits_no_longer_than_the_deadline():
    device = EmulatedDevice(timeout_seconds=0.1)
    device.enqueue(device.compute, lambda: None, lambda: False)
    with pytest.raises(TimeoutError, match=r"GPU 0 \(emulated\) did not finish a test"):
        device.synchronise("a test")


def test_streams_order_nothing_but_themselves_and_events():
    """Over seeds both orders of two streams are seen, and one only behind an event."""

    def order(seed, *, waits):
        device, seen = EmulatedDevice(Machine(seed)), []
        other, event = device.stream(), device.event()
        device.enqueue(device.compute, lambda: seen.append(1))
        device.record(event, device.compute)
        if waits:
            device.wait(other, event)
        device.enqueue(other, lambda: seen.append(2))
        while len(seen) < 2:
            device.machine.look()
        return tuple(seen)

    assert {order(seed, waits=False) for seed in range(20)} == {(1, 2), (2, 1)}
    assert {order(seed, waits=True) for seed in range(20)} == {(1, 2)}


def test_the_host_may_not_touch_a_device_array():
    array = EmulatedDevice().allocate(64).view(np.float32)
    assert isinstance(array[2:].reshape(2, 7), DeviceArray)
    for touch in (
        lambda: array.copy(),
        lambda: array + 1,
        lambda: array.fill(0),
        lambda: np.copyto(array, 0),
        lambda: array[0],
        lambda: array.__setitem__(0, 1),
        lambda: array.tobytes(),
    ):
        with pytest.raises(TypeError, match="the host touched an array of a device"):
            touch()


def test_an_arena_of_a_device():
    device = EmulatedDevice()
    arena = Arena(device=device)
    with arena.scope():
        first, second = arena.empty((3, 5), DTYPES["bfloat16"]), arena.empty((1,), np.float32)
        assert first.shape == (3, 5)
        assert first.dtype == DTYPES["bfloat16"]
        assert device.owns(first)
        assert second.ctypes.data - first.ctypes.data == DEVICE_ALIGNMENT_BYTES
    assert arena.peak_bytes == 2 * DEVICE_ALIGNMENT_BYTES
    dry = Arena(dry=True, alignment_bytes=DEVICE_ALIGNMENT_BYTES)
    dry.empty((3, 5), DTYPES["bfloat16"])
    assert dry.used_bytes == DEVICE_ALIGNMENT_BYTES
    blocks, allocated = arena.blocks, device.allocated
    for _ in range(300):
        with arena.scope():
            arena.empty((1000,), np.float32)
    assert (arena.blocks, device.allocated) == (blocks, allocated)
    with pytest.raises(ValueError, match="shared: expected host memory"):
        arena.empty((1,), np.uint8, shared=True)
    with pytest.raises(MemoryError, match="GPU 0"):
        arena.empty((1 << 31,), np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_a_clock_of_events(seed):
    """Spans are those of the device, in its order; the host's order and time play no part."""
    device = EmulatedDevice(Machine(seed))
    trace = Trace(EventClock(device))
    stream = device.stream()
    for _ in range(3):
        with trace.step():
            seen = trace.post("cp", [Message(np.zeros(8, np.uint8), 1, 0)], [])
            with trace.span("compute", "linear"):
                for _ in range(50):
                    device.enqueue(device.compute, lambda: None)
            event = device.event()
            device.record(event, stream)
            seen(0, stream)
            with trace.span("wait", "cp"):
                device.wait(device.compute, event)
        step = trace.last
        compute, wait = step.spans
        assert compute.stop - compute.start >= 49e-6
        assert step.start <= compute.start < compute.stop <= wait.start < wait.stop <= step.stop
        assert [flight.axis for flight in step.flights] == ["cp"]
        assert step.times().compute >= 49e-6
    events = device.events
    with trace.step(), trace.span("compute", "linear"):
        pass
    assert device.events == events, "events of a step serve the next one"
    with trace.span("compute", "linear"):
        pass
    assert trace.host_clock() > 0


def test_a_step_that_fails_on_a_device_keeps_the_last_one():
    device = EmulatedDevice()
    trace = Trace(EventClock(device))
    with trace.step(), trace.span("compute", "add"):
        pass
    last = trace.last

    def fail():
        with trace.step():
            device.enqueue(device.compute, lambda: None, lambda: False)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert trace.last is last


def test_local_index():
    nodes = ["a", "b", "a", "a", "b"]
    assert [local_index(rank, nodes) for rank in range(5)] == [0, 0, 1, 2, 1]


HERE = Offer("n0", "01", "2.28.9", "")


@pytest.mark.parametrize(
    ("offers", "expected"),
    [
        ([HERE], Choice(True, "nccl 2.28.9")),
        ([HERE, HERE._replace(bus_id="02")], Choice(True, "nccl 2.28.9")),
        ([HERE, HERE._replace(node="n1")], Choice(True, "nccl 2.28.9")),
        ([HERE, HERE], Choice(False, "host-staged MPI: ranks 0 and 1 share GPU 01")),
        (
            [HERE, HERE._replace(nccl="", lack="no NCCL")],
            Choice(False, "host-staged MPI: rank 1: no NCCL"),
        ),
        (
            [HERE, HERE._replace(bus_id="02", nccl="2.30.1")],
            Choice(False, "host-staged MPI: rank 0 has NCCL 2.28.9, rank 1 has 2.30.1"),
        ),
    ],
)
def test_choice(offers, expected):
    assert choose("auto", offers) == expected
    assert choose("staged", offers) == Choice(False, "host-staged MPI: as requested")
    if expected.nccl:
        assert choose("nccl", offers) == expected
    else:
        with pytest.raises(RefusedError, match="transport nccl: rank"):
            choose("nccl", offers)


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy")


def test_cupy_arrays_of_any_dtype(cupy):
    """Slices, views and shapes keep their place in memory; no device is needed to look."""
    from pympa.hardware.device_cupy import address, device_array

    memory = np.zeros(4096, np.uint8)
    unowned = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0)
    pointer = cupy.cuda.MemoryPointer(unowned, 0)
    block = device_array(pointer, (4096,), np.dtype(np.uint8))
    for dtype in (*DTYPES.values(), np.dtype(np.int32), np.dtype(np.int64)):
        array = block[256 : 256 + 12 * dtype.itemsize].view(dtype).reshape(3, 4)
        assert (array.shape, array.dtype, array.itemsize) == ((3, 4), dtype, dtype.itemsize)
        assert address(array) == memory.ctypes.data + 256
        assert address(array[1:]) - address(array) == 4 * dtype.itemsize
        assert flat_bytes(array[1:]).shape == (8 * dtype.itemsize,)
        assert block[256:256].view(dtype).reshape(0, 7).shape == (0, 7)
        with pytest.raises(ValueError, match="C-contiguous"):
            flat_bytes(array[:, 1:])
    assert address(memory) == memory.ctypes.data


def test_no_device_is_refused(cupy):
    from pympa.hardware.device_cupy import CupyDevice

    try:
        if cupy.cuda.runtime.getDeviceCount():
            pytest.skip("there is a device")
    except cupy.cuda.runtime.CUDARuntimeError:
        pass
    with pytest.raises(RefusedError, match=r"backend cuda: .*; .*, or use --backend cpu"):
        CupyDevice(0)


def test_no_cupy_is_refused():
    code = """
import sys
sys.modules["cupy"] = None
from pympa.hardware.device_cupy import CupyDevice
from pympa.errors import RefusedError
try:
    CupyDevice(0)
except RefusedError as error:
    print(error)
"""
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "backend cuda: CuPy cannot be imported" in job.stdout
    assert "pip install 'pympa[cuda]'" in job.stdout


def test_codes_of_nccl(cupy):
    """CuPy's table of errors ends before NCCL's."""
    nccl = pytest.importorskip("cupy.cuda.nccl")
    if not nccl.available:
        pytest.skip("CuPy finds no NCCL")
    from pympa.transport.nccl import NcclError
    from pympa.transport.nccl_cupy import _checked

    assert _checked(nccl, lambda: nccl.check_status(7)) is None
    for code, words in ((5, "invalid usage"), (8, "deadline"), (99, "error 99")):
        with pytest.raises(NcclError, match=words):
            _checked(nccl, lambda code=code: nccl.check_status(code))
