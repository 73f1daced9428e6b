"""Loops on virtual clocks: the first passes are simulated, and the last of them is repeated.

Equal layers, chunks of rows and micro-batches take the same time once a loop is in a steady state.
So only the first passes run. Then the clock and the counters of the rank advance by the last pass,
once for each remaining pass. The difference between the last two simulated passes is recorded; if
it is too large, the simulation starts again with more passes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from pympa.runtime.loops import Loops
from pympa.runtime.trace import Trace
from pympa.runtime.traffic import Traffic
from pympa.sim.world import VirtualEndpoint

T = TypeVar("T")


@dataclass
class Extrapolation:
    """The number of passes that a simulated world runs, and their largest difference.

    Attributes:
        passes: the number of passes of each loop that run before others are extrapolated, at least
            2; None means all.
        drift: the largest relative difference between the last two passes that ran, over all loops
            that were extrapolated.
        layers: the number of passes through layers that ran, by rank.
    """

    passes: int | None = 2
    drift: float = 0.0
    layers: Counter[int] = field(default_factory=Counter)


class _Mark(NamedTuple):
    """The clock of a rank, the seconds in its kernels and its bytes at one time."""

    seconds: float
    worked: float
    traffic: Traffic


class ExtrapolatedLoops(Loops):
    """Loops that run their first passes and add the last one again for each remaining pass.

    Args:
        extrapolation: the state shared by all ranks.
        endpoint: the endpoint of the rank, with its clock.
        trace: the trace of the rank's spans.
        traffic: the counters of the rank's bytes.
    """

    def __init__(
        self,
        extrapolation: Extrapolation,
        endpoint: VirtualEndpoint,
        trace: Trace,
        traffic: Traffic,
    ) -> None:
        self._extrapolation, self._endpoint = extrapolation, endpoint
        self._trace, self._traffic = trace, traffic
        self._micro_batches: defaultdict[int, list[tuple[_Mark, _Mark]]] = defaultdict(list)
        self._kinds: set[Hashable] = set()

    def chunks(self, chunks: Sequence[T], kind: Hashable = None) -> Iterable[T]:
        """Return the first chunks; only one if a loop of this kind has run before in the step."""
        again = kind is not None and kind in self._kinds
        self._kinds.add(kind)
        return self._first(chunks, 1 if again else self._extrapolation.passes)

    def layers(self, layers: Sequence[T]) -> Iterable[T]:
        """Return the first layers."""
        for layer in self._first(layers, self._extrapolation.passes):
            self._extrapolation.layers[self._endpoint.rank] += 1
            yield layer

    def restart(self) -> None:
        """Forget the loops of the last step."""
        self._micro_batches.clear()
        self._kinds.clear()

    @contextmanager
    def micro_batch(self, kind: int) -> Iterator[bool]:
        """Run the first micro-batches of a kind; for each later one, add the last one's time."""
        done = self._micro_batches[kind]
        if self._extrapolation.passes is None or len(done) < self._extrapolation.passes:
            before = self._mark()
            yield True
            done.append((before, self._mark()))
        else:
            yield False
            self._check(done[-2:])
            self._repeat(done[-1], 1)

    def _first(self, items: Sequence[T], passes: int | None) -> Iterable[T]:
        """Yield the first items, then add the last one's time and bytes for each of the others."""
        if passes is None or self._extrapolation.passes is None or len(items) <= passes:
            yield from items
            return
        done = []
        for item in items[:passes]:
            before = self._mark()
            yield item
            done.append((before, self._mark()))
        self._check(done[-2:])
        self._repeat(done[-1], len(items) - passes)

    def _mark(self) -> _Mark:
        return _Mark(self._trace.clock(), self._endpoint.worked(), self._traffic.copy())

    def _check(self, passes: Sequence[tuple[_Mark, _Mark]]) -> None:
        """Record the relative difference between two passes if it is the largest so far."""
        seconds = [stop.seconds - start.seconds for start, stop in passes]
        if max(seconds) > 0:
            change = 1 - min(seconds) / max(seconds)
            self._extrapolation.drift = max(self._extrapolation.drift, change)

    def _repeat(self, done: tuple[_Mark, _Mark], times: int) -> None:
        """Add the time, bytes and spans of one pass to clock, counters and trace, `times` times."""
        start, stop = done
        self._traffic.repeat(start.traffic, stop.traffic, times)
        now = self._trace.clock()
        self._endpoint.skip(
            times * (stop.seconds - start.seconds), times * (stop.worked - start.worked)
        )
        self._trace.repeat((start.seconds, stop.seconds), (now, self._trace.clock()), times)
