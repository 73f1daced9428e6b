"""The seconds of a kernel on a device, by its data sheet or by measured curves.

`MeasuredCosts` uses the curves of `python -m pympa.calibrate`. The sizes of a curve:

| kernel | sizes |
|---|---|
| linear | rows, outputs, inputs; a gated layer has twice the outputs; groups are added up |
| attend_block | for one kv head: rows × its query heads, keys that a row sees, head_dim |
| mlp | rows, width, hidden columns; × 1.5 hidden columns with a gate |
| weights | rows: extra seconds of a product when 2^20 weights come from memory |
| activation.NAME | rows, outputs: extra seconds of the function after a linear |
| others | rows, bytes of each row that are read and written |
| call.NAME | none: seconds of a call that has nothing to do |
| between | bytes that the previous kernel moved: seconds of Python before the next kernel |
"""

from __future__ import annotations

from typing import Protocol

from pympa.costs.calls import AttentionCall, GemmCall, ranges_of
from pympa.costs.cluster import Device
from pympa.costs.curves import Curve
from pympa.costs.datasheet import DatasheetCosts
from pympa.plan.accounting import visible_pairs
from pympa.plan.layout import Layout

_WEIGHTS = 1 << 20  # the number of weights in the curve "weights"
_LAST_CUT, _FIRST_CUT = 10.0, 20.0
"""Keys that the kernel computes for a row in addition to those that the row sees. After the last
one: half a strip of 6 rows and half a vector of 16 keys. Before a window's first one: half a strip,
and for scores half a panel of 64 keys."""


class Costs(Protocol):
    """Seconds of kernels on one device."""

    takes_large_pieces: bool
    """Whether kernels need enough rows to fill a device, not few enough to fit a core's cache."""

    def linears(self, call: GemmCall) -> float:
        """Return the seconds of the products of one call."""

    def mlp(self, call: GemmCall, columns: int) -> float:
        """Return the seconds of products, an activation and products with `columns` outputs."""

    def attend(self, call: AttentionCall) -> float:
        """Return the seconds of attention."""

    def by_rows(self, kernel: str, rows: int, row_bytes: float) -> float:
        """Return the seconds of a kernel that reads and writes `row_bytes` bytes for each row."""


def costs_of(device: Device, dtype: str, ranks: int) -> Costs:
    """Return the costs of kernels on a device.

    Args:
        device: the hardware.
        dtype: the dtype of weights and activations.
        ranks: the number of ranks that compute at once.

    Raises:
        ValueError: the device has no figures for this dtype.
    """
    return MeasuredCosts(device, dtype, ranks) if device.curves else DatasheetCosts(device, dtype)


class MeasuredCosts:
    """Seconds of kernels by curves, including Python between one kernel and the next.

    Args:
        device: the device, with curves.
        dtype: the dtype of weights and activations.
        ranks: the number of ranks that compute at once. The curves for the next larger measured
            number are used, or for the largest.

    Raises:
        ValueError: the device has no curves for this dtype.
    """

    takes_large_pieces = False

    def __init__(self, device: Device, dtype: str, ranks: int) -> None:
        dtypes = sorted({curve.dtype for curve in device.curves} - {""})
        if dtype not in dtypes:
            raise ValueError(
                f"{device.name}: dtype: expected one of {', '.join(dtypes)}, which have curves; "
                f"got {dtype}"
            )
        self._cache_bytes = device.cache_bytes
        self._curves: dict[str, Curve] = {}
        wanted = [curve for curve in device.curves if curve.dtype in (dtype, "")]
        for curve in sorted(wanted, key=lambda c: (c.ranks < ranks, abs(c.ranks - ranks))):
            self._curves.setdefault(curve.kernel, curve)

    def linears(self, call: GemmCall) -> float:
        """See `Costs.linears`."""
        return self._multiply("linear", call, call.outputs, call.k)

    def mlp(self, call: GemmCall, columns: int) -> float:
        """See `Costs.mlp`."""
        width = (call.k + columns) / 2
        return self._multiply("mlp", call, width, call.n * (1.5 if call.gated else 1))

    def _multiply(self, kernel: str, call: GemmCall, a: float, b: float) -> float:
        """Return the seconds of a kernel whose curve has the sizes (rows, a, b)."""
        once, rows = self._at("call.linear"), [m for m in call.rows if m]
        work = sum(max(0.0, self._at(kernel, m, a, b) - once) for m in rows)
        # A step reads all weights once, so the cache keeps only as many as fit.
        from_memory = 1 - self._cache_bytes / max(call.weight_bytes, self._cache_bytes, 1)
        if from_memory > 0:
            weights = a * b * (2 if kernel == "mlp" else 1)
            work += from_memory * sum(self._at("weights", m) for m in rows) * weights / _WEIGHTS
        if call.activation != "none":
            work += self._at(self._activation(call.activation), sum(rows), call.n)
        return once + work + self._between(call.nbytes)

    def attend(self, call: AttentionCall) -> float:
        """See `Costs.attend`."""
        group, dim = call.heads / call.kv_heads, (call.head_dim + call.v_head_dim) / 2
        work = 0.0
        for a in ranges_of(call.q):
            for b in ranges_of(call.k):
                visible = 0
                if a.sequence == b.sequence:
                    pair = Layout((a,)), Layout((b,))
                    visible = visible_pairs(*pair, call.causal, call.window)
                if visible == 0:
                    continue
                rows = a.length
                if call.causal:
                    rows -= max(0, b.start - a.start)
                keys = visible / rows
                if visible < rows * b.length:
                    cut = _LAST_CUT if call.window is None else _LAST_CUT + _FIRST_CUT
                    keys = min(keys + cut, b.length)
                # All rows that see keys share the packed keys.
                packed = min(b.length, a.start + a.length - b.start) if call.causal else b.length
                seconds = self._at("attend_block", group * rows, keys, dim)
                seconds += self._at("attend_block", 1, packed, dim)
                work += seconds - self._at("attend_block", 1, keys, dim)
        return self._at("call.attend_block") + call.kv_heads * work + self._between(call.nbytes)

    def by_rows(self, kernel: str, rows: int, row_bytes: float) -> float:
        """See `Costs.by_rows`."""
        # Kernels without a curve are rare; they take the time of a copy of the same bytes.
        measured = kernel if kernel in self._curves else "copy"
        seconds = self._at(measured, rows, row_bytes) if rows else self._at("call.linear")
        return seconds + self._between(rows * row_bytes)

    def _activation(self, name: str) -> str:
        """Return the curve of a function; a clamped SwiGLU is a SiLU and a few instructions."""
        curve = f"activation.{name}"
        return curve if curve in self._curves else "activation.silu"

    def _between(self, nbytes: float) -> float:
        return self._at("between", nbytes)

    def _at(self, kernel: str, *sizes: float) -> float:
        return self._curves[kernel].at(*sizes)
