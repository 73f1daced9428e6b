"""What a step did: computing, waiting and messages in flight on one clock, and the load of experts.

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

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.event_clock import EventClock

Kind = Literal["compute", "wait"]
Interval = tuple[float, float]
Clock = Callable[..., float]
"""Returns the time, or a mark that stands for it until the step ends; takes a stream on devices."""

NamedRanges = tuple[Callable[[str], object], Callable[[], object]]
"""What begins a range of a name for a profiler, and what ends the last one."""

_NO_SPAN = nullcontext()


class Seen(Protocol):
    """Called once for each message, when it is seen to be done."""

    def __call__(self, index: int, stream: int | None = None) -> None:
        """Take note of a message.

        Args:
            index: of the message, receives first.
            stream: of a device, on which it is done as soon as all before is; None means now.
        """


class Parcel(Protocol):
    """A message, as the transport has it."""

    @property
    def array(self) -> NDArray[Any]:
        """What travels."""

    @property
    def peer(self) -> int:
        """The world rank that it goes to or comes from."""


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
    """Seconds of a step with messages of one axis in flight; see `pympa.trace`.

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


class _OpenSpan:
    """A span that has begun: a class, for a generator takes as long as a small kernel."""

    __slots__ = ("_clock", "_kind", "_name", "_spans", "_start")

    def __init__(self, clock: Clock, spans: list[Span], kind: Kind, name: str):
        self._clock, self._spans, self._kind, self._name = clock, spans, kind, name

    def __enter__(self) -> None:
        self._start = self._clock()

    def __exit__(self, *_: object) -> None:
        self._spans.append(Span(self._kind, self._name, self._start, self._clock()))


class _NamedSpan(_OpenSpan):
    """A span that profilers see as a range of its name."""

    __slots__ = ("_pop", "_push")

    def __init__(self, clock: Clock, spans: list[Span], kind: Kind, name: str, ranges: NamedRanges):
        super().__init__(clock, spans, kind, name)
        self._push, self._pop = ranges

    def __enter__(self) -> None:
        self._push(f"{self._kind} {self._name}")
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._pop()


class Trace:
    """Records the steps of one rank and keeps the last one.

    Args:
        clock: returns seconds, those of a wall clock or of a virtual one; or an `EventClock`.

    Attributes:
        last: the last step that ended.
        named_ranges: where to show spans to a profiler.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.last = Step(0.0, 0.0, [], [])
        self.named_ranges: NamedRanges | None = None
        self._recording = False
        self._spans: list[Span] = []
        self._repeats: Counter[Interval] = Counter()
        self._left_out: list[Interval] = []
        self._flown: list[Any] = []  # the fields of flights in a row: no objects for the collector

    @property
    def host_clock(self) -> Clock:
        """The clock that steps are told by, readable at any time."""
        return time.perf_counter if isinstance(self.clock, EventClock) else self.clock

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record the body as one step, which then is the last one.

        On a device, returns when the device is through with it. A step that fails there leaves
        the last one as it was: what it marked may never come.
        """
        self._spans, self._flown, self._recording = [], [], True
        self._repeats, self._left_out = Counter(), []
        if isinstance(self.clock, EventClock):
            self.clock.restart()
        start = self.clock()
        try:
            yield
        except BaseException:
            self._recording = False
            if not isinstance(self.clock, EventClock):
                self._end(start)
            raise
        self._end(start)

    def _end(self, start: float) -> None:
        stop, self._recording = self.clock(), False
        flown = iter([stop if value is None else value for value in self._flown])
        flights = [*map(Flight._make, zip(*[flown] * len(Flight._fields), strict=True))]
        self.last = Step(start, stop, self._spans, flights)
        if isinstance(self.clock, EventClock):
            self.last = _dated(self.last, self.clock.seconds())
        if self._repeats:
            self.last = _stretched(self.last, self._repeats, self._left_out)

    def repeat(self, done: Interval, left_out: Interval, times: int) -> None:
        """Let one interval stand for `times` more like it, which would have filled another one.

        When the step ends, the first is stretched and the other vanishes, with what lies there.
        """
        if self._recording:
            self._repeats[done] += times
            self._left_out.append(left_out)

    def span(self, kind: Kind, name: str) -> AbstractContextManager[None]:
        """Record the body as one span of the step."""
        if not self._recording:
            return _NO_SPAN
        if self.named_ranges is not None:
            return _NamedSpan(self.clock, self._spans, kind, name, self.named_ranges)
        return _OpenSpan(self.clock, self._spans, kind, name)

    def post(self, axis: str, receives: Sequence[Parcel], sends: Sequence[Parcel]) -> Seen:
        """Begin the flight of messages.

        Args:
            axis: that they travel along.
            receives: that come.
            sends: that go.

        Returns:
            What to call once a message is seen to be done.
        """
        if not self._recording:
            return _forget
        clock, flown, width = self.clock, self._flown, len(Flight._fields)
        start, first_stop = clock(), len(flown) + width - 1
        for received, messages in ((True, receives), (False, sends)):
            for message in messages:
                flown += axis, message.peer, message.array.nbytes, received, start, None

        def seen(index: int, stream: int | None = None) -> None:
            flown[first_stop + width * index] = clock() if stream is None else clock(stream)

        return seen


def _forget(index: int, stream: int | None = None) -> None:
    """Take notice of a message outside of any step."""


def _dated(step: Step, seconds: Sequence[float]) -> Step:
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


def _stretched(step: Step, repeats: Mapping[Interval, int], left_out: Sequence[Interval]) -> Step:
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


class ExpertLoad:
    """Rows that one rank sent to experts, by layer.

    Attributes:
        rows: to each expert, int64 `[experts]`, without those that were dropped.
        dropped: choices past an expert's capacity.
    """

    def __init__(self) -> None:
        self.rows: dict[int, NDArray[np.int64]] = {}
        self.dropped: Counter[int] = Counter()

    def add(self, layer: int, rows: NDArray[np.int64]) -> None:
        """Count rows sent to each expert of a layer."""
        self.rows[layer] = self.rows.get(layer, np.zeros_like(rows)) + rows

    def drop(self, layer: int, choices: int) -> None:
        """Count dropped choices."""
        self.dropped[layer] += choices

    def clear(self) -> None:
        """Start counting from zero; tables taken before keep their counts."""
        self.rows = {}
        self.dropped = Counter()
