"""Times a kernel by the spans of its trace, on arrays that alternate as they do in a step.

A step uses its arrays one after the other, so a kernel finds few of its own in the nearest cache.
Calls therefore cycle through sets of arrays that use `pool_bytes` together, or through `_SETS` sets
where arrays are small.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

from pympa.kernels.rig import Rig
from pympa.kernels.workloads import POOL_BYTES, Run

_SETS = 64  # sets of arrays; together they are smaller than a third-level cache
_SAMPLES, _SAMPLE_SECONDS = 3, 2e-3


class Stopwatch:
    """Times calls of a rig's kernels.

    Args:
        rig: the rig whose trace records the calls.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def seconds(
        self,
        make: Callable[[], Run],
        together: Callable[[], None],
        pool_bytes: int = POOL_BYTES,
    ) -> float:
        """Return the median seconds of a call.

        Args:
            make: a function that returns a call with its own arrays.
            together: a function to call before each sample, so that all ranks measure at once.
            pool_bytes: the bytes of the arrays that calls cycle through.
        """
        with self._rig.arena.scope():
            before = self._rig.arena.used_bytes
            calls = [make()]
            each = max(1, self._rig.arena.used_bytes - before)
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

    def _sample(self, around: itertools.cycle[Run], count: int) -> float:
        """Return the mean seconds of the next calls, from their spans."""
        with self._rig.trace.step():
            for call in itertools.islice(around, count):
                call()
        spans = self._rig.trace.last.spans
        return sum(span.stop - span.start for span in spans) / len(spans)
