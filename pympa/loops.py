"""Loops whose passes do the same on other data: over chunks of rows, over layers that are alike.

On data every pass runs. Where only shapes count, a few stand for the others: a rehearsal needs the
first chunk to know its memory, and a simulated step runs passes until they follow a steady beat,
then lets its clock and its books go on by what the others would have added. Ranks that meet inside
a loop leave out the same passes, for which ones depends on their number only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from pympa.trace import Trace
from pympa.transport import Traffic

T = TypeVar("T")


class Loops:
    """Every pass runs."""

    def chunks(self, chunks: Sequence[T], kind: Hashable = None) -> Iterable[T]:
        """Return the chunks to go through, of some that are alike.

        Args:
            chunks: in order.
            kind: loops of one kind do the same work, on all ranks that meet there.
        """
        return chunks

    def layers(self, layers: Sequence[T]) -> Iterable[T]:
        """Return the layers to go through, of some that follow each other and are alike."""
        return layers

    def restart(self) -> None:
        """Begin a step."""

    def micro_batch(self, kind: int, work: Callable[[], None]) -> None:
        """Do the work of a micro-batch; those of one kind are alike on all ranks."""
        work()


class OneOfEach(Loops):
    """One pass stands for all, as where only memory counts; layers have memory of their own."""

    def __init__(self) -> None:
        self._kinds: set[int] = set()

    def chunks(self, chunks: Sequence[T], kind: Hashable = None) -> Iterable[T]:
        """Return the first chunk."""
        return chunks[:1]

    def restart(self) -> None:
        """Forget the micro-batches of the last step."""
        self._kinds.clear()

    def micro_batch(self, kind: int, work: Callable[[], None]) -> None:
        """Do the work of the first of a kind."""
        if kind not in self._kinds:
            self._kinds.add(kind)
            work()


@dataclass
class Beat:
    """How much of a world's simulated steps ran, and how steady their beat was.

    Attributes:
        passes: that run of each loop, at least 2, before others are left out; None means all.
        drift: largest change between the last two passes that ran where others were left out,
            relative.
        layers: passes of layers that ran, by rank.
    """

    passes: int | None = 2
    drift: float = 0.0
    layers: Counter[int] = field(default_factory=Counter)


class _Mark(NamedTuple):
    """A rank's clock, seconds of its kernels and bytes at one moment."""

    seconds: float
    worked: float
    sent: Counter[tuple[str, int]]
    received: Counter[tuple[str, int]]


class SteadyLoops(Loops):
    """The first passes run and the last of these is repeated, on a virtual clock.

    Args:
        beat: of the world.
        rank: which one.
        trace, traffic: its books.
        worked: tells the seconds that its kernels took so far.
        advance: lets the rank's clock go on, seconds, and how many of them its kernels took.
    """

    def __init__(
        self,
        beat: Beat,
        rank: int,
        trace: Trace,
        traffic: Traffic,
        worked: Callable[[], float],
        advance: Callable[[float, float], None],
    ) -> None:
        self._beat, self._rank = beat, rank
        self._trace, self._traffic = trace, traffic
        self._worked, self._advance = worked, advance
        self._micro_batches: defaultdict[int, list[tuple[_Mark, _Mark]]] = defaultdict(list)
        self._kinds: set[Hashable] = set()

    def chunks(self, chunks: Sequence[T], kind: Hashable = None) -> Iterable[T]:
        """Return the first chunks: one where a loop of the kind was seen to be steady or not."""
        again = kind is not None and kind in self._kinds
        self._kinds.add(kind)
        return self._first(chunks, 1 if again else self._beat.passes)

    def layers(self, layers: Sequence[T]) -> Iterable[T]:
        """Return the first layers."""
        for layer in self._first(layers, self._beat.passes):
            self._beat.layers[self._rank] += 1
            yield layer

    def restart(self) -> None:
        """Forget the loops of the last step."""
        self._micro_batches.clear()
        self._kinds.clear()

    def micro_batch(self, kind: int, work: Callable[[], None]) -> None:
        """Do the work, or repeat the last one of its kind."""
        done = self._micro_batches[kind]
        if self._beat.passes is None or len(done) < self._beat.passes:
            before = self._mark()
            work()
            done.append((before, self._mark()))
            return
        self._check(done[-2:])
        self._repeat(done[-1], 1)

    def _first(self, items: Sequence[T], passes: int | None) -> Iterable[T]:
        """Yield the first items, then repeat what the last of them did for the others."""
        if passes is None or self._beat.passes is None or len(items) <= passes:
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
        sent, received = self._traffic.sent.copy(), self._traffic.received.copy()
        return _Mark(self._trace.clock(), self._worked(), sent, received)

    def _check(self, passes: Sequence[tuple[_Mark, _Mark]]) -> None:
        """Take down how much two passes differ."""
        seconds = [stop.seconds - start.seconds for start, stop in passes]
        if max(seconds) > 0:
            change = 1 - min(seconds) / max(seconds)
            self._beat.drift = max(self._beat.drift, change)

    def _repeat(self, done: tuple[_Mark, _Mark], times: int) -> None:
        """Let clock, bytes and trace go on by what one pass did, so many times."""
        start, stop = done
        for counts, before, after in (
            (self._traffic.sent, start.sent, stop.sent),
            (self._traffic.received, start.received, stop.received),
        ):
            for key, count in after.items():
                counts[key] += times * (count - before[key])
        now = self._trace.clock()
        self._advance(times * (stop.seconds - start.seconds), times * (stop.worked - start.worked))
        self._trace.repeat((start.seconds, stop.seconds), (now, self._trace.clock()), times)
