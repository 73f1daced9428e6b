"""What a kernel takes on a device: flops over a rate by shape, or bytes over bandwidth.

A kernel takes whichever is longer, and never less than a launch (the roofline of Williams et al.
2009, with tiles and waves). Linears are padded to whole tiles, and waves of tiles to whole
processors. Attention counts the pairs that its mask lets through.
"""

from __future__ import annotations

import math

from pympa.cluster import Device

CAUSAL_SHARE = 0.75  # below this part of all pairs the causal rate holds


class Costs:
    """Seconds of kernels on one device.

    Args:
        device: the hardware.
        dtype: of weights and activations.
    """

    def __init__(self, device: Device, dtype: str) -> None:
        self._device = device
        self._peak = device.flops_per_second[dtype]
        self._bandwidth = device.memory_bytes_per_second * device.memory_efficiency
        self._rates = sorted(device.attention, key=lambda rate: rate.head_dim)

    def memory(self, nbytes: float) -> float:
        """Return the seconds that a kernel takes which reads and writes so many bytes."""
        return max(self._device.launch_seconds, nbytes / self._bandwidth)

    def linear(self, m: int, n: int, k: int, nbytes: float) -> float:
        """Return the seconds of a product `[m, k] x [k, n]` that moves so many bytes."""
        if min(m, n, k) == 0:
            return 0.0
        rows, columns = self._device.linear_tile
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        waves = math.ceil(tiles / self._device.processors)
        padded = 2 * rows * columns * k * waves * self._device.processors
        compute = padded / (self._peak * self._device.linear_efficiency)
        # Less than a wave may be cut along k instead, so that all processors work.
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
        # A narrower head takes the time of the kernel's own width.
        flops = 2 * visible * heads * (head_dim + v_head_dim)
        padding = max(1.0, 2 * rate.head_dim / (head_dim + v_head_dim))
        return max(flops * padding / speed, self.memory(nbytes))
