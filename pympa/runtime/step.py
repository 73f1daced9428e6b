"""The record of one step of one rank: computing, waiting and messages in flight, on one clock.

A step is one forward pass; nothing is recorded outside of a step. All times are seconds on the
rank's own clock:

- compute: the time inside kernels. exposed wait: the time inside `Transport.wait`. A rank does one
  thing at a time, so compute + exposed wait + other = step. Other is the time between them (Python,
  starting and polling messages).
- in flight, of an axis: the time in which a message of the axis was posted by `Transport.start` and
  not yet seen to be done (the union over messages: two at once count once). A message is seen at
  the first `poll`, `start` or `wait` after it is done. So this is not the time in which bytes
  moved: a receive counts from its posting, though its sender may still compute, and a message that
  ends between two polls counts until the second. Keys that kernels read in another rank's shared
  memory are in no message: their time belongs to the kernel.
- exposed, of an axis: the part of its time in flight in which the rank waited, for any message.
  hidden: the other part. So in flight = exposed + hidden, exposed <= exposed wait, and waiting for
  one axis never counts as hiding another.

On a device the clock is an `EventClock`, and the times are those of the stream of kernels. Compute
is the time from the start to the end of a kernel, a wait the time in which the stream waited for
messages, other the time in which the host had not yet given it work. A message is in flight from
the time the stream reached its start until its own stream finished it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

Kind = Literal["compute", "wait"]
Interval = tuple[float, float]


class Span(NamedTuple):
    """One interval, in seconds on the trace's clock."""

    kind: Kind
    name: str
    start: float
    stop: float


class Flight(NamedTuple):
    """One message, from its posting until it was seen to be done.

    Attributes:
        axis: the name of its axis.
        peer: the world rank of the other side.
        nbytes: the number of bytes.
        received: whether this rank received it from the peer; otherwise it sent it.
        start: the time of the posting.
        stop: the time at which it was seen to be done.
    """

    axis: str
    peer: int
    nbytes: int
    received: bool
    start: float
    stop: float


class Overlap(msgspec.Struct, frozen=True):
    """Seconds of a step with messages of one axis in flight; see `pympa.runtime.step`.

    Attributes:
        in_flight: the seconds in flight.
        exposed: the part in which the rank waited.
        hidden: the part in which it did not wait.
    """

    in_flight: float
    exposed: float
    hidden: float


class Times(NamedTuple):
    """The parts of the time of one step, in seconds.

    Attributes:
        step: the seconds of the whole step.
        compute: the seconds in kernels.
        waits: the seconds of exposed waiting, by axis.
        hidden: the hidden seconds of messages of any axis.
        overlap: the seconds in flight, by axis.
    """

    step: float
    compute: float
    waits: dict[str, float]
    hidden: float
    overlap: dict[str, Overlap]


class Step(NamedTuple):
    """The record of one step of one rank.

    Attributes:
        start: the time of its start.
        stop: the time of its end.
        spans: the spans in order of time, without overlap.
        flights: the messages in the order of posting; one that is not done counts until the end.
    """

    start: float
    stop: float
    spans: list[Span]
    flights: list[Flight]

    def times(self) -> Times:
        """Add up the parts of the time."""
        waits: defaultdict[str, float] = defaultdict(float)
        for span in self.spans:
            if span.kind == "wait":
                waits[span.name] += span.stop - span.start
        waited = union((s.start, s.stop) for s in self.spans if s.kind == "wait")
        flying: defaultdict[str, list[Interval]] = defaultdict(list)
        for flight in self.flights:
            flying[flight.axis].append((flight.start, flight.stop))
        by_axis = {axis: union(intervals) for axis, intervals in flying.items()}
        anything = union(interval for intervals in by_axis.values() for interval in intervals)
        return Times(
            self.stop - self.start,
            sum(span.stop - span.start for span in self.spans if span.kind == "compute"),
            dict(waits),
            _overlap(anything, waited).hidden,
            {axis: _overlap(intervals, waited) for axis, intervals in by_axis.items()},
        )


def mean_times(steps: Sequence[Times]) -> Times:
    """Return the means over steps; an axis that a step does not use counts as 0 there."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(steps)

    nothing = Overlap(0.0, 0.0, 0.0)
    overlap = {}
    for axis in sorted({axis for step in steps for axis in step.overlap}):
        found = [step.overlap.get(axis, nothing) for step in steps]
        overlap[axis] = Overlap(
            mean(o.in_flight for o in found),
            mean(o.exposed for o in found),
            mean(o.hidden for o in found),
        )
    waited = sorted({axis for step in steps for axis in step.waits})
    return Times(
        mean(step.step for step in steps),
        mean(step.compute for step in steps),
        {axis: mean(step.waits.get(axis, 0.0) for step in steps) for axis in waited},
        mean(step.hidden for step in steps),
        overlap,
    )


def dated(step: Step, seconds: Sequence[float]) -> Step:
    """Return a step with its marks replaced by times.

    Args:
        step: the step as recorded on a device.
        seconds: the time of each mark.
    """

    def at(mark: float) -> float:
        return seconds[int(mark)]

    return Step(
        at(step.start),
        at(step.stop),
        [Span(s.kind, s.name, at(s.start), at(s.stop)) for s in step.spans],
        [Flight(*f[:4], at(f.start), at(f.stop)) for f in step.flights],
    )


def stretched(step: Step, repeats: Mapping[Interval, int], left_out: Sequence[Interval]) -> Step:
    """Return a step in which each repeated pass fills the time of all its repetitions.

    Args:
        step: the step as recorded.
        repeats: the number of further passes that each interval represents; intervals may be
            nested.
        left_out: the intervals that these passes would have filled.
    """
    marks: list[tuple[float, int, int, int]] = [(step.stop, 1, 1, 0)]
    for (start, stop), times in repeats.items():  # time, factor, divisor of the pace, gaps
        marks += (start, 1 + times, 1, 0), (stop, 1, 1 + times, 0)
    for start, stop in left_out:
        marks += (start, 1, 1, 1), (stop, 1, 1, -1)
    recorded, stretched = [step.start], [step.start]
    pace, gaps = 1, 0
    for at, factor, divisor, opens in sorted(marks):
        length = 0.0 if gaps else pace * (at - recorded[-1])
        recorded.append(at)
        stretched.append(stretched[-1] + length)
        pace, gaps = pace * factor // divisor, gaps + opens

    def moved(parts: Sequence[Any]) -> list[list[float]]:
        ends = np.array([(part.start, part.stop) for part in parts]).reshape(-1, 2)
        found: list[list[float]] = np.interp(ends, recorded, stretched).tolist()
        return found

    return Step(
        step.start,
        stretched[-1],
        [Span(s.kind, s.name, *at) for s, at in zip(step.spans, moved(step.spans), strict=True)],
        [Flight(*f[:4], *at) for f, at in zip(step.flights, moved(step.flights), strict=True)],
    )


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of the intervals, as disjoint ones in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def _overlap(flying: Sequence[Interval], waited: Sequence[Interval]) -> Overlap:
    """Split the time in flight by whether the rank waited; both are disjoint and in order."""
    exposed, first = 0.0, 0
    for start, stop in flying:
        while first < len(waited) and waited[first][1] <= start:
            first += 1
        at = first
        while at < len(waited) and waited[at][0] < stop:
            exposed += min(stop, waited[at][1]) - max(start, waited[at][0])
            at += 1
    in_flight = sum(stop - start for start, stop in flying)
    return Overlap(in_flight, exposed, max(in_flight - exposed, 0.0))
