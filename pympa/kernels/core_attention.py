"""Attention: the part of `CoreKernels` that updates a running softmax state."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.kernels import AttentionSpec, Core, KvBlock, State
from pympa.plan.layout import Layout
from pympa.runtime.arena import Arena, Array
from pympa.runtime.trace import Trace


class AttentionKernels:
    """See `Kernels`; a base of `CoreKernels`, which sets the attributes."""

    _arena: Arena
    _trace: Trace
    _core: Core
    _execution: dict[str, Any]

    def start_state(self, state: State, sinks: Array | None = None) -> None:
        """See `Kernels.start_state`."""
        with self._trace.span("compute", "start_state"):
            self._core.start_state(sinks=sinks, **state._asdict(), **self._execution)

    def attend_block(
        self, q: Array, q_layout: Layout, kv: KvBlock, state: State, spec: AttentionSpec
    ) -> None:
        """See `Kernels.attend_block`."""
        with self._trace.span("compute", "attend_block"), self._arena.scope():
            self._core.attend_block(
                q=q,
                k=kv.k,
                v=kv.v,
                q_ranges=q_layout.array,
                k_ranges=kv.ranges,
                kv_head_of_q=spec.kv_head_of_q,
                decode=spec.decode,
                workspace=self._attend_workspace(q, q_layout, kv, spec),
                **state._asdict(),
                **_rule(spec),
                **self._execution,
            )

    def score_tile(
        self, q: Array, k: Array, kv_head_of_q: NDArray[np.int32], scores: Array
    ) -> None:
        """See `Kernels.score_tile`."""
        with self._trace.span("compute", "score_tile"), self._arena.scope():
            self._core.score_tile(
                q=q,
                k=k,
                kv_head_of_q=kv_head_of_q,
                scores=scores,
                workspace=self._attention_workspace(q.dtype, q.shape[2], 0),
                **self._execution,
            )

    def fold_tile(
        self,
        scores: Array,
        q_start: int,
        k_start: int,
        v: Array,
        state: State,
        spec: AttentionSpec,
    ) -> None:
        """See `Kernels.fold_tile`."""
        with self._trace.span("compute", "fold_tile"), self._arena.scope():
            self._core.fold_tile(
                scores=scores,
                v=v,
                kv_head_of_q=spec.kv_head_of_q,
                q_start=q_start,
                k_start=k_start,
                workspace=self._attention_workspace(v.dtype, 0, v.shape[2]),
                **state._asdict(),
                **_rule(spec),
                **self._execution,
            )

    def merge(self, state: State, other: State) -> None:
        """See `Kernels.merge`."""
        with self._trace.span("compute", "merge"):
            self._core.merge(
                **state._asdict(),
                other_row_max=other.row_max,
                other_row_sum=other.row_sum,
                other_out=other.out,
                **self._execution,
            )

    def finish(self, state: State, o: Array, lse: Array) -> None:
        """See `Kernels.finish`."""
        with self._trace.span("compute", "finish"):
            self._core.finish(o=o, lse=lse, **state._asdict(), **self._execution)

    def _attend_workspace(
        self, q: Array, q_layout: Layout, kv: KvBlock, spec: AttentionSpec
    ) -> Array:
        v_head_dim = kv.v.shape[2]
        extra = self._core.range_workspace_bytes(
            heads=q.shape[1],
            kv_heads=kv.k.shape[1],
            head_dim=q.shape[2],
            v_head_dim=v_head_dim,
            dtype=str(q.dtype),
            q_ranges=q_layout.array,
            k_ranges=kv.ranges,
            decode=spec.decode,
            **self._execution,
        )
        return self._attention_workspace(q.dtype, q.shape[2], v_head_dim, extra)

    def _attention_workspace(
        self, dtype: np.dtype[Any], head_dim: int, v_head_dim: int, extra_bytes: int = 0
    ) -> Array:
        size = self._core.attention_workspace_bytes(
            head_dim=head_dim, v_head_dim=v_head_dim, dtype=str(dtype), **self._execution
        )
        return self._arena.empty((size + extra_bytes,), np.uint8, "workspaces")


def _rule(spec: AttentionSpec) -> dict[str, Any]:
    """Return the arguments of a core that turn scores into probabilities."""
    return {
        "scale": spec.scale,
        "causal": spec.causal,
        "window": spec.window or 0,
        "softcap": spec.softcap or 0.0,
    }
