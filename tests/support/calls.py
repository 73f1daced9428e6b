"""Functions of a core on arrays of the host, with outputs and workspaces made on the spot.

Outputs start as NaN and workspaces as 0xFF, so that what is read before it is written shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def rubbish(size: int) -> Array:
    """Return a workspace."""
    return np.full(size, 0xFF, np.uint8)


def key_ranges(ranges: Sequence[tuple[int, ...]]) -> Array:
    """Return key ranges `[n, 4]`; those without a first row lie one after the other."""
    rows = np.cumsum([0, *(r[2] for r in ranges)])
    filled = [r if len(r) == 4 else (*r, row) for r, row in zip(ranges, rows, strict=False)]
    return np.array(filled, np.int64).reshape(-1, 4)


class Calls:
    """See the module; a base of `Rig`, which sets the attributes."""

    core: Any
    isa: str

    def on(self, threads: int = 1) -> Any:
        """Return what a call runs on."""
        return self.core.Execution(self.isa, threads=threads)

    def pack(self, weight: Array) -> Array:
        """Pack a weight `[n, k]`, or those of a group `[groups, n, k]`."""
        if weight.ndim == 3:
            return np.stack([self.pack(one) for one in weight])
        n, k = weight.shape
        size = self.core.packed_weight_bytes(n, k, weight.dtype.name, self.on())
        packed = np.full(size, 0xA5, np.uint8)
        self.core.pack_weight(weight, packed, self.on())
        return packed

    def linear(
        self, x: Array, weight: Array, *, out: Array | None = None, out_dtype: Any = None,
        group_rows: Sequence[int] | None = None, threads: int = 1, **options: Any,
    ) -> Array:  # fmt: skip
        """Return x W^T; options are bias, activation, residual and branch of the core's."""
        if out is None:
            out = np.full((len(x), weight.shape[-2]), np.nan, out_dtype or x.dtype)
        defaults = {"bias": None, "activation": "none", "residual": None, "branch": None}
        self.core.linear(
            x=x,
            packed=self.pack(weight),
            out=out,
            group_rows=_counts(group_rows),
            workspace=self._linear_workspace(x, weight, False, threads),
            on=self.on(threads),
            **defaults | options,
        )
        return out

    def gated_linear(
        self, x: Array, gate: Array, up: Array, *, activation: str, limit: float = 0.0,
        alpha: float = 0.0, group_rows: Sequence[int] | None = None, threads: int = 1,
        **biases: Any,
    ) -> Array:  # fmt: skip
        """Return act(x Wg^T) * (x Wu^T); biases are `bias_gate` and `bias_up`."""
        out = np.full((len(x), gate.shape[-2]), np.nan, x.dtype)
        self.core.gated_linear(
            x=x,
            packed_gate=self.pack(gate),
            packed_up=self.pack(up),
            out=out,
            activation=activation,
            limit=limit,
            alpha=alpha,
            group_rows=_counts(group_rows),
            workspace=self._linear_workspace(x, gate, True, threads),
            on=self.on(threads),
            **{"bias_gate": None, "bias_up": None} | biases,
        )
        return out

    def mlp(
        self, x: Array, up: Array, down: Array, *, activation: str, gate: Array | None = None,
        out: Array | None = None, out_dtype: Any = None, item_rows: int = 96,
        limit: float = 0.0, alpha: float = 0.0,
        group_rows: Sequence[int] | None = None, threads: int = 1, **options: Any,
    ) -> Array:  # fmt: skip
        """Return an MLP in one pass; options are biases, residual and branch of the core's."""
        n, hidden = down.shape[-2:]
        if out is None:
            out = np.full((len(x), n), np.nan, out_dtype or x.dtype)
        on, gated = self.on(threads), gate is not None
        names = ("bias_gate", "bias_up", "bias", "residual", "branch")
        self.core.mlp(
            x=x,
            packed_gate=None if gate is None else self.pack(gate),
            packed_up=self.pack(up),
            packed_down=self.pack(down),
            out=out,
            activation=activation,
            limit=limit,
            alpha=alpha,
            hidden=hidden,
            group_rows=_counts(group_rows),
            item_rows=item_rows,
            workspace=rubbish(
                self.core.mlp_workspace_bytes(item_rows, hidden, n, x.dtype.name, gated, on)
            ),
            on=on,
            **dict.fromkeys(names) | options,
        )
        return out

    def attend(
        self, q: Array, k: Array, v: Array, state: Sequence[Array], *,
        q_ranges: Sequence[tuple[int, int, int]], k_ranges: Sequence[tuple[int, ...]],
        kv_head_of_q: Any = None, scale: float | None = None, threads: int = 1, **rule: Any,
    ) -> None:  # fmt: skip
        """Fold keys into `state` in place; the rule is that of `_rule`, and `decode`."""
        heads, head_dim = q.shape[1:]
        if kv_head_of_q is None:
            kv_head_of_q = np.arange(heads) * k.shape[1] // heads
        if scale is None:
            scale = head_dim**-0.5
        ranges = np.array(q_ranges, np.int64).reshape(-1, 3), key_ranges(k_ranges)
        decode, on = rule.pop("decode", False), self.on(threads)
        dtype, v_head_dim = q.dtype.name, v.shape[2]
        size = self.core.attention_workspace_bytes(head_dim, v_head_dim, dtype, on)
        size += self.core.range_workspace_bytes(
            heads, k.shape[1], head_dim, v_head_dim, dtype, *ranges, decode, on
        )
        self.core.attend_block(
            q=q,
            k=k,
            v=v,
            q_ranges=ranges[0],
            k_ranges=ranges[1],
            kv_head_of_q=np.array(kv_head_of_q, np.int32),
            decode=decode,
            workspace=rubbish(size),
            on=on,
            **_state(state),
            **_rule(scale=scale, **rule),
        )

    def score_tile(
        self, q: Array, k: Array, kv_head_of_q: Any, *, out: Array | None = None, threads: int = 1
    ) -> Array:
        """Return scores `[rows, heads, keys]`."""
        if out is None:
            out = np.full((len(q), q.shape[1], len(k)), np.nan, np.float32)
        on = self.on(threads)
        size = self.core.attention_workspace_bytes(q.shape[2], 0, q.dtype.name, on)
        self.core.score_tile(q, k, np.array(kv_head_of_q, np.int32), out, rubbish(size), on)
        return out

    def fold_tile(
        self, scores: Array, v: Array, state: Sequence[Array], kv_head_of_q: Any, *,
        q_start: int, k_start: int, threads: int = 1, **rule: Any,
    ) -> None:  # fmt: skip
        """Fold scores into `state` in place; the rule is that of `_rule`."""
        on = self.on(threads)
        size = self.core.attention_workspace_bytes(0, v.shape[2], v.dtype.name, on)
        self.core.fold_tile(
            scores=scores,
            v=v,
            kv_head_of_q=np.array(kv_head_of_q, np.int32),
            q_start=q_start,
            k_start=k_start,
            workspace=rubbish(size),
            on=on,
            **_state(state),
            **_rule(**rule),
        )

    def _linear_workspace(self, x: Array, weight: Array, gated: bool, threads: int) -> Array:
        n, k = weight.shape[-2:]
        on = self.on(threads)
        return rubbish(self.core.linear_workspace_bytes(len(x), n, k, x.dtype.name, gated, on))


def _counts(group_rows: Sequence[int] | None) -> Array | None:
    return None if group_rows is None else np.array(group_rows, np.int64)


def _state(state: Sequence[Array]) -> dict[str, Array]:
    return dict(zip(("row_max", "row_sum", "out"), state, strict=True))


def _rule(
    *, scale: float = 1.0, causal: bool = True, window: int = 0, softcap: float = 0.0
) -> dict[str, Any]:
    """Return which keys a row sees, and what becomes of scores; 0 means none."""
    return {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
