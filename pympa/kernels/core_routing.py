"""Routing: the part of `CoreKernels` that moves rows to experts and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.kernels import DEFAULT_ROUTING, Core
from pympa.runtime.arena import Array
from pympa.runtime.trace import Trace
from pympa.spec import Routing


class RoutingKernels(ABC):
    """See `Kernels`; a base of `CoreKernels`, which sets the attributes."""

    _trace: Trace
    _core: Core
    _execution: dict[str, Any]

    @abstractmethod
    def _synchronize(self, what: str) -> None:
        """Wait until all kernels so far are done, because the host will read `what`."""

    def select_experts(
        self,
        logits: Array,
        experts: Array,
        weights: Array,
        *,
        renormalize: bool,
        routing: Routing = DEFAULT_ROUTING,
        choice_bias: Array | None = None,
    ) -> int:
        """See `Kernels.select_experts`.

        Raises:
            ValueError: there is a choice bias and the routing has none, or the other way round.
        """
        if (choice_bias is not None) != routing.choice_bias:
            wanted, got = ("an array", "None") if routing.choice_bias else ("None", "an array")
            raise ValueError(
                f"select_experts: choice_bias: expected {wanted} with routing.choice_bias = "
                f"{routing.choice_bias}; got {got}"
            )
        with self._trace.span("compute", "select_experts"):
            self._synchronize("finite gate logits")
            row: int = self._core.select_experts(
                logits=logits,
                experts=experts,
                weights=weights,
                renormalize=renormalize,
                score=routing.score,
                groups=routing.groups,
                top_groups=routing.chosen_groups,
                group_score=routing.group_score,
                scale=routing.scale,
                choice_bias=choice_bias,
                **self._execution,
            )
            return row

    def sort_rows(
        self, experts: Array, count: int, sources: Array, inverse: Array
    ) -> NDArray[np.int64]:
        """See `Kernels.sort_rows`."""
        counts = np.zeros(count, np.int64)
        with self._trace.span("compute", "sort_rows"):
            self._synchronize("rows of each expert")
            self._core.sort_rows(
                experts=experts, counts=counts, sources=sources, inverse=inverse, **self._execution
            )
        return counts

    def count_experts(
        self, experts: Array, segment_rows: NDArray[np.int64], count: int
    ) -> NDArray[np.int64]:
        """See `Kernels.count_experts`."""
        counts = np.zeros((len(segment_rows), count), np.int64)
        with self._trace.span("compute", "count_experts"):
            self._synchronize("rows of each expert")
            self._core.count_experts(
                experts=experts, segment_rows=segment_rows, counts=counts, **self._execution
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
            self._synchronize("rows that are dropped")
            self._core.drop_overflow(
                experts=experts,
                segment_rows=segment_rows,
                used=used,
                capacity=capacity,
                **self._execution,
            )

    def combine_rows(
        self,
        rows: Array,
        inverse: Array,
        weights: Array,
        base: Array | None,
        out: Array,
        *,
        base_gate: Array | None = None,
    ) -> None:
        """See `Kernels.combine_rows`."""
        with self._trace.span("compute", "combine_rows"):
            self._core.combine_rows(
                rows=rows,
                inverse=inverse,
                weights=weights,
                base=base,
                base_gate=base_gate,
                out=out,
                **self._execution,
            )
