"""What a kernel takes on a device: by its data sheet (`pympa.sheet`), or by measured curves.

`MeasuredCosts` looks seconds up in the curves of `python -m pympa.calibrate`. Sizes of a curve:

| kernel | sizes |
|---|---|
| linear | rows, outputs, inputs; a gated layer has its outputs twice, a group its rows in turn |
| attend_block | of a kv head: rows times its query heads, keys that a row sees, head_dim |
| mlp | rows, width, hidden columns; half as many again where there is a gate |
| weights | rows: what a product takes longer if 2^20 weights come from memory |
| activation.NAME | rows, outputs: what the function adds to a linear |
| others | rows, bytes of a row that are read and written |
| call.NAME | none: a call that has nothing to do |
| between | bytes that the kernel before moved: Python until the next one |
"""

from __future__ import annotations

from typing import Protocol

from pympa.accounting import visible_pairs
from pympa.calls import Attended, Multiplied, ranges_of
from pympa.cluster import Device
from pympa.curves import Curve
from pympa.layout import Layout
from pympa.sheet import SheetCosts

_WEIGHTS = 1 << 20  # that the curve of that name is of
_LAST_CUT, _FIRST_CUT = 10.0, 20.0
"""Keys that a row meets past what it sees: after the last, half a strip of 6 rows and half a vector
of 16 keys; before a window's first, half a strip, and for scores half a panel of 64 keys."""


class Costs(Protocol):
    """Seconds of kernels on one device."""

    takes_large_pieces: bool
    """Kernels want as many rows at a time as fill a device, not as fit a core's cache."""

    def linears(self, call: Multiplied) -> float:
        """Return the seconds of products that are one call."""

    def mlp(self, call: Multiplied, columns: int) -> float:
        """Return the seconds of products that go on through an activation to so many columns."""

    def attend(self, call: Attended) -> float:
        """Return the seconds of attention."""

    def by_rows(self, kernel: str, rows: int, row_bytes: float) -> float:
        """Return the seconds of a kernel that reads and writes so many bytes for each row."""


def costs_of(device: Device, dtype: str, ranks: int) -> Costs:
    """Return what kernels take on a device.

    Args:
        device: the hardware.
        dtype: of weights and activations.
        ranks: that compute at once.

    Raises:
        ValueError: the device has no figures in this dtype.
    """
    return MeasuredCosts(device, dtype, ranks) if device.curves else SheetCosts(device, dtype)


class MeasuredCosts:
    """Seconds of kernels by curves, Python between one kernel and the next included.

    Args:
        device: with curves.
        dtype: of weights and activations.
        ranks: that compute at once; curves of the next larger number count, or of the largest.

    Raises:
        ValueError: there are none of this dtype.
    """

    takes_large_pieces = False

    def __init__(self, device: Device, dtype: str, ranks: int) -> None:
        dtypes = sorted({curve.dtype for curve in device.curves} - {""})
        if dtype not in dtypes:
            raise ValueError(f"{device.name}: measured in {', '.join(dtypes)}; got {dtype}")
        self._cache_bytes = device.cache_bytes
        self._curves: dict[str, Curve] = {}
        wanted = [curve for curve in device.curves if curve.dtype in (dtype, "")]
        for curve in sorted(wanted, key=lambda c: (c.ranks < ranks, abs(c.ranks - ranks))):
            self._curves.setdefault(curve.kernel, curve)

    def linears(self, call: Multiplied) -> float:
        """See `Costs.linears`."""
        return self._multiply("linear", call, call.outputs, call.k)

    def mlp(self, call: Multiplied, columns: int) -> float:
        """See `Costs.mlp`."""
        width = (call.k + columns) / 2
        return self._multiply("mlp", call, width, call.n * (1.5 if call.gated else 1))

    def _multiply(self, kernel: str, call: Multiplied, a: float, b: float) -> float:
        """Return the seconds of a kernel whose curve has the sizes (rows, a, b)."""
        once, rows = self._at("call.linear"), [m for m in call.rows if m]
        work = sum(max(0.0, self._at(kernel, m, a, b) - once) for m in rows)
        # A step meets all weights in turn: a cache keeps no more of them than it holds.
        far = 1 - self._cache_bytes / max(call.weight_bytes, self._cache_bytes, 1)
        if far > 0:
            weights = a * b * (2 if kernel == "mlp" else 1)
            work += far * sum(self._at("weights", m) for m in rows) * weights / _WEIGHTS
        if call.activation != "none":
            work += self._at(f"activation.{call.activation}", sum(rows), call.n)
        return once + work + self._between(call.nbytes)

    def attend(self, call: Attended) -> float:
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
                # Keys are packed once for all rows, whichever see them.
                packed = min(b.length, a.start + a.length - b.start) if call.causal else b.length
                here = self._at("attend_block", group * rows, keys, dim)
                here += self._at("attend_block", 1, packed, dim)
                work += here - self._at("attend_block", 1, keys, dim)
        return self._at("call.attend_block") + call.kv_heads * work + self._between(call.nbytes)

    def by_rows(self, kernel: str, rows: int, row_bytes: float) -> float:
        """See `Costs.by_rows`."""
        # What is not measured is rare, and moves its bytes as a copy does.
        measured = kernel if kernel in self._curves else "copy"
        seconds = self._at(measured, rows, row_bytes) if rows else self._at("call.linear")
        return seconds + self._between(rows * row_bytes)

    def _between(self, nbytes: float) -> float:
        return self._at("between", nbytes)

    def _at(self, kernel: str, *sizes: float) -> float:
        return self._curves[kernel].at(*sizes)
