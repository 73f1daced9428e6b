"""One GPU with our kernels and torch on the same stream, and the way that both are timed.

A batch of calls lies between two CUDA events, behind a kernel that waits until the host has started
all of them. What is compared takes turns. Inputs take turns too, so that together they exceed the
L2 cache, and are random: zeros would draw less power and run faster.
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

from pympa.arena import Arena
from pympa.contract import TOLERANCE
from pympa.device_cupy import device_array
from pympa.kernels import PackedWeight
from pympa.kernels.cuda import CudaKernels, open_accelerator
from pympa.spec import DTYPES
from pympa.trace import Trace

DTYPE = "bfloat16"
_BATCH_SECONDS = 4e-3  # of calls between two events, or there are two
_MOST_CALLS = 50
_CYCLES_PER_SECOND = 2e9  # of a multiprocessor, at most: waits get longer where there are fewer
_SHORTEST_WAIT_SECONDS = 3e-4
_COPY_BYTES = 1 << 30
_PRODUCT = 8192

Work = Callable[[int], Any]
"""Starts one call on the input of a number."""


class Ceilings(NamedTuple):
    """What a library reaches: flop/s of a product, bytes/s read and written by a copy."""

    flops: float
    bytes: float


class Rig:
    """See the module.

    Args:
        output: gets a JSON line for each figure.
        rounds: timed batches of which the median counts.

    Attributes:
        headlines: figures for a summary. failed: cases that did.

    Raises:
        RefusedError: there is no GPU, or none of our kernels.
    """

    def __init__(self, output: IO[str], rounds: int) -> None:
        accelerator = open_accelerator(0, timeout_seconds=120)
        self.device, self._core = accelerator.device, accelerator.core
        self._on = self._core.Execution("cuda", stream=self.device.compute)
        self._output, self._rounds = output, rounds
        self.headlines: list[str] = []
        self.failed: list[str] = []
        self.arena = Arena(device=self.device)
        self.kernels = CudaKernels(accelerator=accelerator, arena=self.arena, trace=Trace())
        self.dtype = getattr(torch, DTYPE)
        torch.cuda.init()
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        self._stream = torch.cuda.ExternalStream(self.device.compute)
        torch.cuda.set_stream(self._stream)
        self._cache_bytes = int(torch.cuda.get_device_properties(0).L2_cache_size)
        self._ceilings = Ceilings(1.0, 1.0)
        self._events = self.device.event(timed=True), self.device.event(timed=True)

    def attempt(self, what: str, case: Callable[[], None]) -> None:
        """Run a case; one that fails is told, and hides no other."""
        try:
            case()
        except (ValueError, RuntimeError, MemoryError, TimeoutError) as error:
            self.failed.append(what)
            print(f"{what}: FAILED: {type(error).__name__}: {error}")

    def measure_ceilings(self) -> None:
        """Measure what later figures are shares of."""
        n = _PRODUCT
        a, b = ([self.normal(n, n) for _ in range(2)] for _ in range(2))
        source, target = self.bytes(_COPY_BYTES), self.bytes(_COPY_BYTES)
        (product,) = self.time(lambda i: torch.matmul(a[i % 2], b[i % 2]))
        (copied,) = self.time(lambda _: target.copy_(source))
        self._ceilings = Ceilings(2 * n**3 / product, 2 * _COPY_BYTES / copied)
        self.tell(f"ceiling: product {n} × {n} × {n}", product, flops=2 * n**3)
        self.tell("ceiling: copy of 1 GiB", copied, moved=2 * _COPY_BYTES)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Return normal numbers."""
        made = torch.randn(shape, device="cuda", dtype=self.dtype)
        return made if scale == 1.0 else made.mul_(scale)

    def bytes(self, size: int) -> torch.Tensor:
        """Return random bytes."""
        return torch.randint(-128, 128, (size,), device="cuda", dtype=torch.int8)

    def ours(self, tensor: torch.Tensor) -> Any:
        """Return an array of ours on the memory of a contiguous tensor, which it keeps alive."""
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
        """Return how many inputs of `size` bytes are twice the L2 cache; at least 2, at most 8."""
        return min(max(-(-2 * self._cache_bytes // size), 2), 8)

    def time(self, *works: Work) -> list[float]:
        """Return the median seconds of a call of each, taken in turn after a warm-up."""
        plans = [self._planned(work) for work in works]
        taken: list[list[float]] = [[] for _ in works]
        for _ in range(self._rounds):
            for seconds, work, (calls, wait) in zip(taken, works, plans, strict=True):
                seconds.append(self._batch(work, calls, wait))
        return [statistics.median(seconds) for seconds in taken]

    def _planned(self, work: Work) -> tuple[int, float]:
        """Return how many calls make a batch, and the seconds that the host needs to start them."""
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
        """Compare with what is right.

        Raises:
            ValueError: the relative error passes the dtype's tolerance, or is NaN.
        """
        error = float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
        if not error <= TOLERANCE[DTYPE]:
            raise ValueError(
                f"{what}: relative error: expected at most {TOLERANCE[DTYPE]:g}, got {error:.2e}; "
                "not timed"
            )

    def tell(
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
        """Print one line and keep it.

        Args:
            what: was timed.
            seconds: of one call.
            flops: of it, where arithmetic bounds it.
            moved: bytes of it, where memory does.
            peer: seconds of the other.
            peer_name: what that is.
            headline: short name, for a figure that belongs into a summary.
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
