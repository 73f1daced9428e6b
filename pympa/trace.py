"""Records what a step does, and the load of experts; `pympa.step` says what the times mean."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pympa.event_clock import EventClock
from pympa.step import Flight, Interval, Kind, Span, Step, dated, stretched

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
            self.last = dated(self.last, self.clock.seconds())
        if self._repeats:
            self.last = stretched(self.last, self._repeats, self._left_out)

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
