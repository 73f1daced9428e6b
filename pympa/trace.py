"""What a step did: spans of computing and of waiting on one clock, and the load of its experts."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
