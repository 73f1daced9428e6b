"""One GPU with our kernels and torch on the same stream, and the timing of both.

A batch of calls is timed between two CUDA events, behind a kernel that waits until the host has
started all of them. Batches of ours and of the peer alternate. Inputs alternate too, so that
together they exceed the L2 cache, and are random: zeros would draw less power and run faster.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import cupy
import numpy as np
import torch

from pympa.hardware.device_cupy import device_array
from pympa.kernels import PackedWeight
from pympa.kernels.cuda import open_accelerator
from pympa.kernels.rig import Rig
from pympa.spec import DTYPES
from pympa.verify.contract import TOLERANCE

DTYPE = "bfloat16"
_BATCH_SECONDS = 4e-3  # the least time between two events, except for batches of two calls
_MOST_CALLS = 50
_CYCLES_PER_SECOND = 2e9  # the most of a multiprocessor: with fewer cycles, waits get longer
_SHORTEST_WAIT_SECONDS = 3e-4
_COPY_BYTES = 1 << 30
_PRODUCT = 8192

Work = Callable[[int], Any]
"""A function that starts one call on the input with a number."""


class Ceilings(NamedTuple):
    """The rates of libraries: flop/s of a product, bytes/s read and written by a copy."""

    flops: float
    bytes: float


class GpuRig(Rig):
    """Our kernels and torch on one GPU; see the module.

    Args:
        output: a file that gets a JSON line for each figure.
        rounds: the number of timed batches, of which the median counts.

    Attributes:
        headlines: the figures for a summary.
        failed: the names of the cases that failed.

    Raises:
        RefusedError: the GPU or our kernels are missing.
    """

    def __init__(self, output: IO[str], rounds: int) -> None:
        accelerator = open_accelerator(0, timeout_seconds=120)
        self.device, self._core = accelerator.device, accelerator.core
        self._on = self._core.Execution("cuda", stream=self.device.compute)
        self._output, self._rounds = output, rounds
        self.headlines: list[str] = []
        self.failed: list[str] = []
        super().__init__(DTYPES[DTYPE], accelerator=accelerator)
        self.torch_dtype = getattr(torch, DTYPE)
        torch.cuda.init()
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        self._stream = torch.cuda.ExternalStream(self.device.compute)
        torch.cuda.set_stream(self._stream)
        self._cache_bytes = int(torch.cuda.get_device_properties(0).L2_cache_size)
        self._ceilings = Ceilings(1.0, 1.0)
        self._events = self.device.event(timed=True), self.device.event(timed=True)

    def attempt(self, what: str, case: Callable[[], None]) -> None:
        """Run a case; if it fails, print the error and continue."""
        try:
            case()
        except (ValueError, RuntimeError, MemoryError, TimeoutError) as error:
            self.failed.append(what)
            print(f"{what}: FAILED: {type(error).__name__}: {error}")

    def measure_ceilings(self) -> None:
        """Measure the ceilings of later figures."""
        n = _PRODUCT
        a, b = ([self.random(n, n) for _ in range(2)] for _ in range(2))
        source, target = self.bytes(_COPY_BYTES), self.bytes(_COPY_BYTES)
        (product,) = self.time(lambda i: torch.matmul(a[i % 2], b[i % 2]))
        (copied,) = self.time(lambda _: target.copy_(source))
        self._ceilings = Ceilings(2 * n**3 / product, 2 * _COPY_BYTES / copied)
        self.report(f"ceiling: product {n} × {n} × {n}", product, flops=2 * n**3)
        self.report("ceiling: copy of 1 GiB", copied, moved=2 * _COPY_BYTES)

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Return normal numbers."""
        made = torch.randn(shape, device="cuda", dtype=self.torch_dtype)
        return made if scale == 1.0 else made.mul_(scale)

    def bytes(self, size: int) -> torch.Tensor:
        """Return random bytes."""
        return torch.randint(-128, 128, (size,), device="cuda", dtype=torch.int8)

    def ours(self, tensor: torch.Tensor) -> Any:
        """Return our array on the memory of a contiguous tensor, which it keeps alive."""
        size = tensor.numel() * tensor.element_size()
        memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), size, tensor)
        name = str(tensor.dtype).removeprefix("torch.")
        dtype = DTYPES[name] if name in DTYPES else np.dtype(name)
        return device_array(cupy.cuda.MemoryPointer(memory, 0), tuple(tensor.shape), dtype)

    def packed(self, weight: torch.Tensor) -> PackedWeight:
        """Return a weight `[n, k]` in the order of our kernels, in the arena."""
        n, k = weight.shape
        size = self._core.packed_weight_bytes(n=n, k=k, dtype=DTYPE, on=self._on)
        data = self.arena.empty((size,), np.uint8, "weights")
        self._core.pack_weight(weight=self.ours(weight), packed=data, on=self._on)
        return PackedWeight(data, n, k)

    def wide(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        """Return a tensor on the host in float64."""
        return np.asarray(tensor.to("cpu", torch.float64).numpy())

    def sets(self, size: int) -> int:
        """Return the number of inputs of `size` bytes in twice the L2 cache, from 2 to 8."""
        return min(max(-(-2 * self._cache_bytes // size), 2), 8)

    def time(self, *works: Work) -> list[float]:
        """Return the median seconds of a call of each, in alternating batches after a warm-up."""
        plans = [self._planned(work) for work in works]
        taken: list[list[float]] = [[] for _ in works]
        for _ in range(self._rounds):
            for seconds, work, (calls, wait) in zip(taken, works, plans, strict=True):
                seconds.append(self._batch(work, calls, wait))
        return [statistics.median(seconds) for seconds in taken]

    def _planned(self, work: Work) -> tuple[int, float]:
        """Return the number of calls of a batch, and the seconds in which the host starts them."""
        self._batch(work, 2, 0.0)
        begin = time.perf_counter()
        for index in range(2):
            work(index)
        host = (time.perf_counter() - begin) / 2
        self.device.synchronise("a warm-up")
        once = self._batch(work, 2, 4 * host)
        calls = max(2, min(_MOST_CALLS, round(_BATCH_SECONDS / once)))
        return calls, 2 * host * calls

    def _batch(self, work: Work, calls: int, wait: float) -> float:
        start, stop = self._events
        cycles = int(_CYCLES_PER_SECOND * max(wait, _SHORTEST_WAIT_SECONDS))
        torch.cuda._sleep(cycles)
        self.device.record(start, self.device.compute)
        for index in range(calls):
            work(index)
        self.device.record(stop, self.device.compute)
        self.device.finish(stop, "a timed batch")
        return self.device.seconds(start, stop) / calls

    def check(self, what: str, got: Any, want: Any) -> None:
        """Compare a result with the expected one.

        Raises:
            ValueError: the relative error exceeds the dtype's tolerance, or is NaN.
        """
        error = float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
        if not error <= TOLERANCE[DTYPE]:
            raise ValueError(
                f"{what}: relative error: expected at most {TOLERANCE[DTYPE]:g}; got {error:.2e}; "
                "not timed"
            )

    def report(
        self,
        what: str,
        seconds: float,
        *,
        flops: float = 0.0,
        moved: float = 0.0,
        peer: float | None = None,
        peer_name: str = "torch",
        headline: str | None = None,
    ) -> None:
        """Print one line and write it to the output.

        Args:
            what: the name of the case.
            seconds: the seconds of one call.
            flops: the flops of a call, if arithmetic limits it.
            moved: the bytes of a call, if memory limits it.
            peer: the seconds of the peer, or None.
            peer_name: the name of the peer.
            headline: a short name, for a figure that belongs in the summary.
        """
        rate, ceiling, unit = moved / seconds / 1e9, self._ceilings.bytes / 1e9, "GB/s"
        if flops:
            rate, ceiling, unit = flops / seconds / 1e12, self._ceilings.flops / 1e12, "TFLOP/s"
        beside = "" if peer is None else f"  {peer / seconds:5.2f} × {peer_name}"
        share = rate / ceiling
        print(f"{what:46} {1e3 * seconds:9.3f} ms {rate:8.1f} {unit:7} {share:5.0%}{beside}")
        if headline is not None:
            over = "" if peer is None else f" {peer / seconds:.2f}×"
            self.headlines.append(f"{headline} {rate:,.0f} {unit} {share:.0%}{over}")
            print(f"key: {'; '.join(self.headlines)}")
        record = {"what": what, "seconds": seconds, "rate": rate, "unit": unit, "of_ceiling": share}
        record |= {} if peer is None else {"peer": peer_name, "peer_seconds": peer}
        self._output.write(json.dumps(record) + "\n")
        self._output.flush()
