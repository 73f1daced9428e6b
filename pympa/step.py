"""What one rank did in one step: computing, waiting and messages in flight on one clock.

A step is one forward pass, and nothing is recorded outside of one. All times are seconds on the
rank's own clock:

- compute: inside kernels. exposed wait: inside `Transport.wait`, with nothing else to do. A rank
  does one thing at a time, so compute + exposed wait + other = step; other is what lies between
  (Python, starting and polling messages).
- in flight, of an axis: some message of it was posted by `Transport.start` and not yet seen to be
  done (the union over messages: two at once count once). A message is seen at the first `poll`,
  `start` or `wait` after it is done. So this is the time in which the rank knew of something under
  way, not that in which bytes moved: a receive counts from when it was posted, though its sender
  may still compute, and a message that ends between two looks counts until the second. Keys that
  kernels read in another rank's shared memory travel in no message: their time is the kernel's.
- exposed, of an axis: the part of its time in flight in which the rank waited, for whatever
  message. hidden: the rest. So in flight = exposed + hidden, exposed <= exposed wait, and waiting
  for one axis never counts as hiding another.

On a device the clock is an `EventClock`, and all this is said of the stream of its kernels: compute
is the time from one end of a kernel to the other, a wait the time in which the stream had to wait
for messages, other the time in which the host had not yet given it anything. A message is in flight
from when the stream came to its start until its own stream was through with it.
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
    """One stretch of time, seconds on the trace's clock."""

    kind: Kind
    name: str
    start: float
    stop: float


class Flight(NamedTuple):
    """One message, from when it was posted until it was seen to be done.

    peer: world rank. received: it came from the peer; otherwise it went there.
    """

    axis: str
    peer: int
    nbytes: int
    received: bool
    start: float
    stop: float


class Overlap(msgspec.Struct, frozen=True):
    """Seconds of a step with messages of one axis in flight; see `pympa.step`.

    Attributes:
        in_flight: in all. exposed: while the rank waited. hidden: while it did not.
    """

    in_flight: float
    exposed: float
    hidden: float


class Times(NamedTuple):
    """Where the time of one step went, seconds.

    waits: exposed, by axis. hidden: of messages of any axis. overlap: by axis.
    """

    step: float
    compute: float
    waits: dict[str, float]
    hidden: float
    overlap: dict[str, Overlap]


class Step(NamedTuple):
    """What one rank did in one step.

    spans: in order of time, none overlapping. flights: in the order in which they were posted; one
    still under way counts until the end of the step.
    """

    start: float
    stop: float
    spans: list[Span]
    flights: list[Flight]

    def times(self) -> Times:
        """Add up where the time went."""
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
    """Return the means over steps; an axis that a step lacks counts as 0 there."""

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
    """Return a step with times where it has marks.

    Args:
        step: as recorded on a device.
        seconds: of each mark.
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
    """Return a step in which one recorded pass fills the time of all that it stands for.

    Args:
        step: as recorded.
        repeats: passes that each interval stands for besides itself; they may lie inside others.
        left_out: what these passes would have filled.
    """
    marks: list[tuple[float, int, int, int]] = [(step.stop, 1, 1, 0)]
    for (start, stop), times in repeats.items():  # when, factor, divisor of the pace, gaps
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
    """Return the time that lies in any of the intervals, as disjoint ones in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def _overlap(flying: Sequence[Interval], waited: Sequence[Interval]) -> Overlap:
    """Split the time in flight by whether the rank waited; both disjoint and in order."""
    exposed, turn = 0.0, 0
    for start, stop in flying:
        while turn < len(waited) and waited[turn][1] <= start:
            turn += 1
        at = turn
        while at < len(waited) and waited[at][0] < stop:
            exposed += min(stop, waited[at][1]) - max(start, waited[at][0])
            at += 1
    in_flight = sum(stop - start for start, stop in flying)
    return Overlap(in_flight, exposed, max(in_flight - exposed, 0.0))
