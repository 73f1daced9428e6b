"""Loops whose passes do the same work on different data: chunks of rows, layers, micro-batches.

A strategy asks a loop which passes to run. On real data, all of them run. On shapes, a few passes
represent the others: see `footprint.rehearsal` and `sim.loops`. Ranks that communicate inside a
loop skip the same passes, because the choice depends only on the number of passes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Loops:
    """Loops in which every pass runs."""

    def chunks(self, chunks: Sequence[T], kind: Hashable = None) -> Iterable[T]:
        """Return the chunks to run, of some that do the same work.

        Args:
            chunks: the chunks, in order.
            kind: a key for loops that do the same work, on all ranks that communicate in them.
        """
        return chunks

    def layers(self, layers: Sequence[T]) -> Iterable[T]:
        """Return the layers to run, of successive layers that do the same work."""
        return layers

    def restart(self) -> None:
        """Begin a step."""

    @contextmanager
    def micro_batch(self, kind: int) -> Iterator[bool]:
        """Yield, in a `with`, whether the work of a micro-batch runs.

        Args:
            kind: a number for micro-batches that do the same work on different data, on all ranks.
        """
        yield True
