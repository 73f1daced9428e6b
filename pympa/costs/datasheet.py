"""Seconds of a kernel by a data sheet: flops over a rate by shape, or bytes over bandwidth.

A kernel takes the longer of the two, and at least the time of a launch (the roofline of Williams
et al. 2009, with tiles and waves). Linears are padded to whole tiles, and waves of tiles to all
processors. Attention counts the pairs that its mask admits.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

from pympa.costs.calls import AttentionCall, GemmCall, ranges_of
from pympa.costs.cluster import Device
from pympa.plan.accounting import alike_sequences, block_pairs
from pympa.plan.layout import Layout

CAUSAL_SHARE = 0.75  # the causal rate applies below this share of visible pairs


class DatasheetCosts:
    """Seconds of kernels by a data sheet.

    Args:
        device: the hardware.
        dtype: the dtype of weights and activations.

    Raises:
        ValueError: the data sheet has no peak for this dtype.
    """

    takes_large_pieces = True

    def __init__(self, device: Device, dtype: str) -> None:
        if dtype not in device.flops_per_second:
            known = ", ".join(device.flops_per_second)
            raise ValueError(
                f"{device.name}: dtype: expected one of {known}, which have flops_per_second; "
                f"got {dtype}"
            )
        self._device = device
        self._peak = device.flops_per_second[dtype]
        self._bandwidth = device.memory_bytes_per_second * device.memory_efficiency
        self._rates = sorted(device.attention, key=lambda rate: rate.head_dim)

    def linears(self, call: GemmCall) -> float:
        """See `Costs.linears`."""
        compute = sum(self.linear(m, call.outputs, call.k, 0) for m in call.rows)
        return max(compute, self.memory(call.nbytes))

    def mlp(self, call: GemmCall, columns: int) -> float:
        """See `Costs.mlp`."""
        down = call._replace(n=columns, k=call.n, gated=False)
        return self.linears(call) + self.linears(down)

    def attend(self, call: AttentionCall) -> float:
        """See `Costs.attend`."""
        whole, cut, pairs = _count_pairs(call.q, call.k, call.causal, call.window)
        dims = call.heads, call.head_dim, call.v_head_dim
        seconds = self.attention(whole, whole, *dims, 0) + self.attention(cut, pairs, *dims, 0)
        return max(seconds, self.memory(call.nbytes))

    def by_rows(self, kernel: str, rows: int, row_bytes: float) -> float:
        """See `Costs.by_rows`."""
        return self.memory(rows * row_bytes)

    def memory(self, nbytes: float) -> float:
        """Return the seconds of a kernel that reads and writes `nbytes` bytes."""
        return max(self._device.launch_seconds, nbytes / self._bandwidth)

    def linear(self, m: int, n: int, k: int, nbytes: float) -> float:
        """Return the seconds of a product `[m, k] x [k, n]` that moves `nbytes` bytes."""
        if min(m, n, k) == 0:
            return 0.0
        rows, columns = self._device.linear_tile
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        waves = math.ceil(tiles / self._device.processors)
        padded = 2 * rows * columns * k * waves * self._device.processors
        compute = padded / (self._peak * self._device.linear_efficiency)
        # Tiles of less than a wave can be split along k instead, so that all processors work.
        least = 2 * tiles * rows * columns * k / (self._peak * self._device.linear_efficiency)
        return max(min(compute, 2 * least), self.memory(nbytes))

    def attention(
        self, visible: int, pairs: int, heads: int, head_dim: int, v_head_dim: int, nbytes: float
    ) -> float:
        """Return the seconds of attention over `visible` of `pairs` query-key pairs."""
        if visible == 0:
            return 0.0
        widest = max(head_dim, v_head_dim)
        rate = next((r for r in self._rates if r.head_dim >= widest), self._rates[-1])
        speed = rate.causal if visible < CAUSAL_SHARE * pairs else rate.full
        # A head that is narrower than the kernel's width takes the time of that width.
        flops = 2 * visible * heads * (head_dim + v_head_dim)
        padding = max(1.0, rate.head_dim / widest)
        return max(flops * padding / speed, self.memory(nbytes))


@lru_cache(maxsize=1 << 17)  # the blocks of a ring of 256 ranks
def _count_pairs(
    q_ranges: bytes, k_ranges: bytes, causal: bool, window: int | None
) -> tuple[int, int, int]:
    """Return the visible pairs of whole blocks, and the visible and all pairs of cut blocks.

    A block is a range of queries and a range of keys. A block is whole if the mask admits all its
    pairs, and cut if it admits some. Results are cached: layers repeat the same blocks, and so do
    the ranks of `tp`.
    """
    q, k = _layout(q_ranges), _layout(k_ranges)
    whole = cut = pairs = 0
    for (of_q, of_k), count in alike_sequences(q, k):
        for a, b in itertools.product(of_q, of_k):
            visible = block_pairs(a, b, causal, window)
            if visible == a[1] * b[1]:
                whole += count * visible
            elif visible:
                cut, pairs = cut + count * visible, pairs + count * a[1] * b[1]
    return whole, cut, pairs


@lru_cache(maxsize=1 << 10)
def _layout(ranges: bytes) -> Layout:
    """Return the layout of ranges; it is cached because it computes its properties only once."""
    return Layout(tuple(ranges_of(ranges)))
