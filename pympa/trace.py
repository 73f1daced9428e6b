"""Where a step's time goes: spans of computing and of waiting, on one clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

Kind = Literal["compute", "wait"]


class Span(NamedTuple):
    """One stretch of time, seconds on the trace's clock."""

    kind: Kind
    name: str
    start: float
    stop: float


class Trace:
    """Collects the spans of one rank.

    Args:
        clock: returns seconds; a wall clock, or a virtual one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.spans: list[Span] = []

    @contextmanager
    def span(self, kind: Kind, name: str) -> Iterator[None]:
        """Record the body as one span."""
        start = self.clock()
        try:
            yield
        finally:
            self.spans.append(Span(kind, name, start, self.clock()))

    def clear(self) -> None:
        """Forget all spans."""
        self.spans.clear()

    def seconds(self, kind: Kind) -> float:
        """Return the total of all spans of a kind."""
        return sum(span.stop - span.start for span in self.spans if span.kind == kind)

    def seconds_by_name(self, kind: Kind) -> dict[str, float]:
        """Return the totals of a kind by name (kernel, or mesh axis waited on)."""
        totals: defaultdict[str, float] = defaultdict(float)
        for span in self.spans:
            if span.kind == kind:
                totals[span.name] += span.stop - span.start
        return dict(totals)
