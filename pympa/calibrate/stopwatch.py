"""Times a kernel by the spans of its trace, on arrays that come round as in a step.

A step touches its arrays in turn, so a kernel finds few of its own in the nearest cache: calls go
round sets of arrays that take `POOL_BYTES` together, or `_SETS` of them where they are small.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from pympa.arena import Arena, Array
from pympa.kernels import State
from pympa.kernels.cpu import CpuKernels
from pympa.trace import Trace

POOL_BYTES, _SETS = 8 << 20, 64  # more than a second-level cache, less than a third
_SAMPLES, _SAMPLE_SECONDS = 3, 2e-3


class Bench:
    """Makes arrays in an arena and calls kernels on them.

    Args:
        dtype: of the arrays.
        isa: instruction set.
    """

    def __init__(self, dtype: np.dtype[Any], isa: str) -> None:
        self.dtype = dtype
        self.arena = Arena()
        self.trace = Trace()
        self.kernels = CpuKernels(isa=isa, threads=1, arena=self.arena, trace=self.trace)

    def filled(self, *shape: int) -> Array:
        """Return an array of small numbers."""
        array = self.arena.empty(shape, self.dtype)
        self.fill(array)
        return array

    def fill(self, array: Array) -> None:
        """Fill an array with small numbers, whatever its floating-point dtype."""
        array.reshape(-1).view(np.uint8)[...] = 0x3C

    def state(self, rows: int, v_head_dim: int, heads: int = 1) -> State:
        """Return a state that has seen a key."""
        shapes = (rows, heads), (rows, heads), (rows, heads, max(1, v_head_dim))
        state = State(*(self.arena.empty(shape, np.float32) for shape in shapes))
        for array in state:
            array.fill(1.0)
        return state

    def seconds(
        self,
        make: Callable[[], Callable[[], object]],
        together: Callable[[], None],
        pool_bytes: int = POOL_BYTES,
    ) -> float:
        """Return the median seconds of a call.

        Args:
            make: returns a call on arrays of its own.
            together: called before each sample, so that ranks measure at once.
            pool_bytes: of the arrays that calls go round.
        """
        with self.arena.scope():
            before = self.arena.used_bytes
            calls = [make()]
            each = max(1, self.arena.used_bytes - before)
            calls += [make() for _ in range(min(_SETS, pool_bytes // each) - 1)]
            for call in calls:
                call()
            around = itertools.cycle(calls)
            one = self._sample(around, len(calls))
            count = max(1, round(_SAMPLE_SECONDS / max(one, 1e-6)))
            samples = []
            for _ in range(_SAMPLES):
                together()
                samples.append(self._sample(around, count))
        return statistics.median(samples)

    def _sample(self, around: itertools.cycle[Callable[[], object]], count: int) -> float:
        """Return the mean seconds of the next calls, as spans have them."""
        with self.trace.step():
            for call in itertools.islice(around, count):
                call()
        spans = self.trace.last.spans
        return sum(span.stop - span.start for span in spans) / len(spans)
