"""Recording of steps, and of the load of experts; `runtime.step` defines the times."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pympa.runtime.clocks import EventClock
from pympa.runtime.step import Flight, Interval, Kind, Span, Step, dated, stretched

Clock = Callable[..., float]
"""A function that returns the time, or, on devices, a mark on a stream until the step ends."""

NamedRanges = tuple[Callable[[str], object], Callable[[], object]]
"""The functions that begin a named range for a profiler, and end the last one."""

_NO_SPAN = nullcontext()


class Seen(Protocol):
    """A function that is called once for each message, when it is seen to be done."""

    def __call__(self, index: int, stream: int | None = None) -> None:
        """Record that a message is done.

        Args:
            index: the index of the message, receives first.
            stream: the stream of a device that will finish it; None means that it is done now.
        """


class TracedMessage(Protocol):
    """A message of a transport."""

    @property
    def array(self) -> NDArray[Any]:
        """The array that is sent or received."""

    @property
    def peer(self) -> int:
        """The world rank of the other side."""


class _OpenSpan:
    """A span that has begun: a class, because a generator takes as long as a small kernel."""

    __slots__ = ("_clock", "_kind", "_name", "_spans", "_start")

    def __init__(self, clock: Clock, spans: list[Span], kind: Kind, name: str):
        self._clock, self._spans, self._kind, self._name = clock, spans, kind, name

    def __enter__(self) -> None:
        self._start = self._clock()

    def __exit__(self, *_: object) -> None:
        self._spans.append(Span(self._kind, self._name, self._start, self._clock()))


class _NamedSpan(_OpenSpan):
    """A span that profilers show as a range of its name."""

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
        clock: a function that returns seconds, of a wall clock or a virtual one; or an
            `EventClock`.

    Attributes:
        last: the last step that ended.
        named_ranges: the functions that show spans to a profiler; None shows none.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.last = Step(0.0, 0.0, [], [])
        self.named_ranges: NamedRanges | None = None
        self._recording = False
        self._spans: list[Span] = []
        self._repeats: Counter[Interval] = Counter()
        self._left_out: list[Interval] = []
        self._flown: list[Any] = []  # fields of flights in a row: few objects to collect

    @property
    def host_clock(self) -> Clock:
        """The clock of the steps' times, readable at any time."""
        return time.perf_counter if isinstance(self.clock, EventClock) else self.clock

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record the body as one step, which becomes the last one.

        On a device, returns when the device has finished the step. A step that fails there leaves
        the last one unchanged, because its marks may never be reached.
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
        """Let one interval represent `times` equal ones, which would have filled another interval.

        When the step ends, the first is stretched, and the other is removed with its contents.
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

    def post(
        self, axis: str, receives: Sequence[TracedMessage], sends: Sequence[TracedMessage]
    ) -> Seen:
        """Begin the flight of messages and return a function to call for each one that is done.

        Args:
            axis: the axis of the messages.
            receives: the messages to receive.
            sends: the messages to send.

        Returns:
            A function for the end of each message.
        """
        if not self._recording:
            return _ignore
        clock, flown, width = self.clock, self._flown, len(Flight._fields)
        start, first_stop = clock(), len(flown) + width - 1
        for received, messages in ((True, receives), (False, sends)):
            for message in messages:
                flown += axis, message.peer, message.array.nbytes, received, start, None

        def seen(index: int, stream: int | None = None) -> None:
            flown[first_stop + width * index] = clock() if stream is None else clock(stream)

        return seen


def _ignore(index: int, stream: int | None = None) -> None:
    """Ignore a message outside of any step."""


class ExpertLoad:
    """The rows that one rank sent to experts, by layer.

    Attributes:
        rows: the number of rows sent to each expert, int64 `[experts]`, without dropped ones.
        dropped: the number of choices that exceeded an expert's capacity.
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
        """Restart the counts from zero; tables that were read before keep their counts."""
        self.rows = {}
        self.dropped = Counter()
