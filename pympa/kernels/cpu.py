"""Kernels on the CPU: `pympa._core`, with workspaces from the arena and spans in the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import _core
from pympa.arena import Arena, Array
from pympa.kernels import AttentionSpec, Core, KvBlock, PackedWeight, State
from pympa.layout import Layout
from pympa.trace import Trace

PIECE_FLOPS = 1.5e9  # 5 ms at 300 GFLOP/s, what one core does in attention


def supported_isas() -> list[str]:
    """Return the instruction sets this CPU runs, best first."""
    return _core.supported_isas()


class CpuKernels:
    """See `Kernels`.

    Args:
        isa: instruction set, one that every rank supports.
        threads: OpenMP threads of a call.
        arena: where workspaces and packed weights come from.
        trace: collects the time of each kernel.
        core: `pympa._core`, or shape-only stand-ins (`pympa.kernels.virtual`).
    """

    piece_flops: float = PIECE_FLOPS

    def __init__(
        self, *, isa: str, threads: int, arena: Arena, trace: Trace, core: Core = _core
    ) -> None:
        self.isa = isa
        self.threads = threads
        self._arena = arena
        self._trace = trace
        self._core = core
        self._how = {"threads": threads, "isa": isa}

    def pack(
        self, shape: tuple[int, int], dtype: np.dtype[Any], fill: Callable[[Array], None]
    ) -> PackedWeight:
        """See `Kernels.pack`."""
        group = self.pack_group(1, shape, dtype, lambda _, weight: fill(weight))
        return PackedWeight(group.data[0], group.n, group.k)

    def pack_group(
        self,
        count: int,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        fill: Callable[[int, Array], None],
    ) -> PackedWeight:
        """See `Kernels.pack_group`."""
        n, k = shape
        size = self._core.packed_weight_bytes(n=n, k=k, dtype=str(dtype), isa=self.isa)
        data = self._arena.empty((count, size), np.uint8)
        with self._arena.scope():
            weight = self._arena.empty(shape, dtype)
            for index, packed in enumerate(data):
                if not self._arena.dry:
                    fill(index, weight)
                self._core.pack_weight(weight=weight, packed=packed, isa=self.isa)
        return PackedWeight(data, n, k)

    def linear(
        self,
        x: Array,
        weight: PackedWeight,
        out: Array,
        *,
        bias: Array | None = None,
        activation: str = "none",
        residual: Array | None = None,
        branch: Array | None = None,
        group_rows: NDArray[np.int64] | None = None,
    ) -> None:
        """See `Kernels.linear`."""
        with self._trace.span("compute", "linear"), self._arena.scope():
            self._core.linear(
                x=x,
                packed=weight.data,
                out=out,
                bias=bias,
                activation=activation,
                residual=residual,
                branch=branch,
                group_rows=group_rows,
                workspace=self._linear_workspace(x, weight, gated=False),
                **self._how,
            )

    def gated_linear(
        self,
        x: Array,
        gate: PackedWeight,
        up: PackedWeight,
        out: Array,
        *,
        activation: str,
        gate_bias: Array | None = None,
        up_bias: Array | None = None,
        group_rows: NDArray[np.int64] | None = None,
    ) -> None:
        """See `Kernels.gated_linear`."""
        with self._trace.span("compute", "gated_linear"), self._arena.scope():
            self._core.gated_linear(
                x=x,
                packed_gate=gate.data,
                packed_up=up.data,
                out=out,
                bias_gate=gate_bias,
                bias_up=up_bias,
                activation=activation,
                group_rows=group_rows,
                workspace=self._linear_workspace(x, up, gated=True),
                **self._how,
            )

    def start_state(self, state: State) -> None:
        """See `Kernels.start_state`."""
        for array, value in zip(state, (-np.inf, 0.0, 0.0), strict=True):
            if not self._arena.dry:
                array.fill(value)

    def attend_block(
        self, q: Array, q_layout: Layout, kv: KvBlock, state: State, spec: AttentionSpec
    ) -> None:
        """See `Kernels.attend_block`."""
        with self._trace.span("compute", "attend_block"), self._arena.scope():
            size = self._core.attention_workspace_bytes(
                head_dim=q.shape[2], v_head_dim=kv.v.shape[2], dtype=str(q.dtype), **self._how
            )
            self._core.attend_block(
                q=q,
                k=kv.k,
                v=kv.v,
                q_ranges=q_layout.array,
                k_ranges=kv.layout.array,
                row_max=state.row_max,
                row_sum=state.row_sum,
                out=state.out,
                kv_head_of_q=spec.kv_head_of_q,
                scale=spec.scale,
                causal=spec.causal,
                window=spec.window or 0,
                softcap=spec.softcap or 0.0,
                workspace=self._arena.empty((size,), np.uint8),
                **self._how,
            )

    def merge(self, state: State, other: State) -> None:
        """See `Kernels.merge`."""
        with self._trace.span("compute", "merge"):
            self._core.merge(
                row_max=state.row_max,
                row_sum=state.row_sum,
                out=state.out,
                other_row_max=other.row_max,
                other_row_sum=other.row_sum,
                other_out=other.out,
                **self._how,
            )

    def finish(self, state: State, o: Array, lse: Array) -> None:
        """See `Kernels.finish`."""
        with self._trace.span("compute", "finish"):
            self._core.finish(
                row_max=state.row_max,
                row_sum=state.row_sum,
                out=state.out,
                o=o,
                lse=lse,
                **self._how,
            )

    def rope(self, x: Array, cos: Array, sin: Array, index: NDArray[np.int32]) -> None:
        """See `Kernels.rope`."""
        with self._trace.span("compute", "rope"):
            self._core.rope(x=x, cos=cos, sin=sin, index=index, **self._how)

    def norm(
        self, x: Array, weight: Array, bias: Array | None, out: Array, *, eps: float, kind: str
    ) -> None:
        """See `Kernels.norm`."""
        with self._trace.span("compute", "norm"):
            self._core.norm(x=x, weight=weight, bias=bias, eps=eps, kind=kind, out=out, **self._how)

    def gather_rows(
        self, source: Array, index: NDArray[np.int32], out: Array, *, first_row: int = 0
    ) -> None:
        """See `Kernels.gather_rows`."""
        with self._trace.span("compute", "gather_rows"):
            self._core.gather_rows(
                source=source, index=index, out=out, first_row=first_row, **self._how
            )

    def select_experts(
        self, logits: Array, experts: Array, weights: Array, *, renormalize: bool
    ) -> int:
        """See `Kernels.select_experts`."""
        with self._trace.span("compute", "select_experts"):
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
            self._core.sort_rows(experts=experts, counts=counts, sources=sources, places=places)
        return counts

    def count_experts(
        self, experts: Array, segment_rows: NDArray[np.int64], count: int
    ) -> NDArray[np.int64]:
        """See `Kernels.count_experts`."""
        counts = np.zeros((len(segment_rows), count), np.int64)
        with self._trace.span("compute", "count_experts"):
            self._core.count_experts(experts=experts, segment_rows=segment_rows, counts=counts)
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
            self._core.drop_overflow(
                experts=experts, segment_rows=segment_rows, used=used, capacity=capacity
            )

    def combine_rows(
        self, rows: Array, places: Array, weights: Array, base: Array | None, out: Array
    ) -> None:
        """See `Kernels.combine_rows`."""
        with self._trace.span("compute", "combine_rows"):
            self._core.combine_rows(
                rows=rows, places=places, weights=weights, base=base, out=out, **self._how
            )

    def add(self, a: Array, b: Array, out: Array) -> None:
        """See `Kernels.add`."""
        with self._trace.span("compute", "add"):
            self._core.add(a=a, b=b, out=out, **self._how)

    def sum_partials(self, parts: Array, bias: Array | None, out: Array) -> None:
        """See `Kernels.sum_partials`."""
        with self._trace.span("compute", "sum_partials"):
            self._core.sum_partials(parts=parts, bias=bias, out=out, **self._how)

    def _linear_workspace(self, x: Array, weight: PackedWeight, *, gated: bool) -> Any:
        size = self._core.linear_workspace_bytes(
            m=x.shape[0], n=weight.n, k=weight.k, dtype=str(x.dtype), gated=gated, **self._how
        )
        return self._arena.empty((size,), np.uint8)
