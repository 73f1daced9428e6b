"""The share of a layer on each rank: heads over `tp`, slices over `dim`, columns over both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pympa.plan.layout import Bounds, joined, split
from pympa.spec import LayerSpec

Shard = tuple[list[Bounds] | None, list[Bounds] | None]
"""The bounds (start, stop) of a weight's rows and of its columns; None means all."""


@dataclass(frozen=True)
class LocalHeads:
    """The heads of one rank: any number of query heads, and the kv heads that they read.

    Attributes:
        q_bounds: the bounds of its query heads among those of the layer.
        kv_bounds: the bounds of its kv heads among those of the layer; ranks may share some.
        kv_head_of_q: the local kv head of each local query head, int32.
    """

    q_bounds: Bounds
    kv_bounds: Bounds
    kv_head_of_q: NDArray[np.int32]

    @property
    def heads(self) -> int:
        """The number of local query heads."""
        return self.q_bounds[1] - self.q_bounds[0]

    @property
    def kv_heads(self) -> int:
        """The number of local kv heads."""
        return self.kv_bounds[1] - self.kv_bounds[0]


def local_heads(layer: LayerSpec, parts: int, index: int) -> LocalHeads:
    """Return the heads of rank `index` of `parts`."""
    first, last = split(layer.heads, parts)[index]
    needed = [layer.kv_head_of(head) for head in range(first, last)]
    kv_first, kv_last = needed[0], needed[-1] + 1
    return LocalHeads((first, last), (kv_first, kv_last), np.array(needed, np.int32) - kv_first)


@dataclass(frozen=True)
class HeadSlices:
    """How the `dim` ranks slice a head.

    Attributes:
        qk: the dimensions of a query or key that each rank has.
        v: the dimensions of a value that each rank has.
        index: the index of this rank.
    """

    qk: tuple[list[Bounds], ...]
    v: tuple[list[Bounds], ...]
    index: int

    @property
    def qk_width(self) -> int:
        """The number of dimensions of this rank's slice of a query or key."""
        return width(self.qk[self.index])

    @property
    def v_width(self) -> int:
        """The number of dimensions of this rank's slice of a value."""
        return width(self.v[self.index])


def slice_heads(layer: LayerSpec, parts: int, index: int) -> HeadSlices:
    """Return the slices of rank `index` of `parts`.

    A pair of dimensions that RoPE rotates together stays together, so a slice can be rotated alone.
    """
    rotated, half = layer.rotated_dim, layer.rotated_dim // 2
    pairs, others = split(half, parts), split(layer.head_dim - rotated, parts)
    qk = tuple(
        joined([(a, b), (half + a, half + b), (rotated + c, rotated + d)])
        for (a, b), (c, d) in zip(pairs, others, strict=True)
    )
    return HeadSlices(qk, tuple([bounds] for bounds in split(layer.value_dim, parts)), index)


def width(parts: list[Bounds]) -> int:
    """Return the number of elements in some (start, stop)."""
    return sum(last - first for first, last in parts)


def attention_shard(name: str, layer: LayerSpec, local: LocalHeads, slices: HeadSlices) -> Shard:
    """Return the part of an attention weight on the rank with these heads."""

    def of_heads(heads: Bounds, dim: int, parts: list[Bounds]) -> list[Bounds]:
        return joined([(h * dim + a, h * dim + b) for h in range(*heads) for a, b in parts])

    by_output = {
        "attention.q": of_heads(local.q_bounds, layer.head_dim, slices.qk[slices.index]),
        "attention.k": of_heads(local.kv_bounds, layer.head_dim, slices.qk[slices.index]),
        "attention.v": of_heads(local.kv_bounds, layer.value_dim, slices.v[slices.index]),
    }
    by_input = {"attention.out": of_heads(local.q_bounds, layer.value_dim, slices.v[slices.index])}
    return by_output.get(name.removesuffix("_bias")), by_input.get(name)


def mlp_shard(name: str, hidden: Bounds) -> Shard:
    """Return the part of an MLP weight on the rank with these hidden columns."""
    kind = name.rpartition(".")[2]
    by_output = kind.removesuffix("_bias") in ("up", "gate")
    return [hidden] if by_output else None, [hidden] if kind == "down" else None
