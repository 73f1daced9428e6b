"""Routing: the part of `CoreKernels` that takes rows to experts and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array
from pympa.kernels import Core
from pympa.trace import Trace


class RoutingKernels(ABC):
    """See `Kernels`; a base of `CoreKernels`, which sets the attributes."""

    _trace: Trace
    _core: Core
    _how: dict[str, Any]

    @abstractmethod
    def _settle(self, what: str) -> None:
        """Return when all kernels so far are done: the host is about to ask for `what`."""

    def select_experts(
        self, logits: Array, experts: Array, weights: Array, *, renormalize: bool
    ) -> int:
        """See `Kernels.select_experts`."""
        with self._trace.span("compute", "select_experts"):
            self._settle("finite gate logits")
            row: int = self._core.select_experts(
                logits=logits,
                experts=experts,
                weights=weights,
                renormalize=renormalize,
                **self._how,
            )
            return row

    def sort_rows(
        self, experts: Array, count: int, sources: Array, places: Array
    ) -> NDArray[np.int64]:
        """See `Kernels.sort_rows`."""
        counts = np.zeros(count, np.int64)
        with self._trace.span("compute", "sort_rows"):
            self._settle("rows of each expert")
            self._core.sort_rows(
                experts=experts, counts=counts, sources=sources, places=places, **self._how
            )
        return counts

    def count_experts(
        self, experts: Array, segment_rows: NDArray[np.int64], count: int
    ) -> NDArray[np.int64]:
        """See `Kernels.count_experts`."""
        counts = np.zeros((len(segment_rows), count), np.int64)
        with self._trace.span("compute", "count_experts"):
            self._settle("rows of each expert")
            self._core.count_experts(
                experts=experts, segment_rows=segment_rows, counts=counts, **self._how
            )
        return counts

    def drop_overflow(
        self,
        experts: Array,
        segment_rows: NDArray[np.int64],
        used: NDArray[np.int64],
        capacity: NDArray[np.int64],
    ) -> None:
        """See `Kernels.drop_overflow`."""
        with self._trace.span("compute", "drop_overflow"):
            self._settle("rows that are dropped")
            self._core.drop_overflow(
                experts=experts,
                segment_rows=segment_rows,
                used=used,
                capacity=capacity,
                **self._how,
            )

    def combine_rows(
        self, rows: Array, places: Array, weights: Array, base: Array | None, out: Array
    ) -> None:
        """See `Kernels.combine_rows`."""
        with self._trace.span("compute", "combine_rows"):
            self._core.combine_rows(
                rows=rows, places=places, weights=weights, base=base, out=out, **self._how
            )
