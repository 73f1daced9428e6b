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
        rotated: the ones of `qk` that RoPE rotates, counted from the first rotated one.
        others: the ones of `qk` that it does not rotate, counted from the first such one.
        index: the index of this rank.
    """

    qk: tuple[list[Bounds], ...]
    v: tuple[list[Bounds], ...]
    rotated: tuple[list[Bounds], ...]
    others: tuple[list[Bounds], ...]
    index: int

    @property
    def qk_width(self) -> int:
        """The number of dimensions of this rank's slice of a query or key."""
        return width(self.qk[self.index])

    @property
    def v_width(self) -> int:
        """The number of dimensions of this rank's slice of a value."""
        return width(self.v[self.index])

    @property
    def rotated_width(self) -> int:
        """The number of dimensions of this rank's slice that RoPE rotates."""
        return width(self.rotated[self.index])


def slice_heads(layer: LayerSpec, parts: int, index: int) -> HeadSlices:
    """Return the slices of rank `index` of `parts`.

    A pair of dimensions that RoPE rotates together stays together, so a slice can be rotated alone.
    """
    rotated, half = layer.rotated_dim, layer.rotated_dim // 2
    interleaved = layer.rope is not None and layer.rope.interleaved
    trailing = layer.rope is not None and layer.rope.trailing
    turning = [
        [(2 * a, 2 * b)] if interleaved else joined([(a, b), (half + a, half + b)])
        for a, b in split(half, parts)
    ]
    others = [joined([bounds]) for bounds in split(layer.head_dim - rotated, parts)]
    first_turning, first_other = (layer.head_dim - rotated, 0) if trailing else (0, rotated)
    qk = []
    for of_pairs, rest in zip(turning, others, strict=True):
        spans = [_moved(rest, first_other), _moved(of_pairs, first_turning)]
        qk.append(joined([span for part in (spans if trailing else spans[::-1]) for span in part]))
    v = [[bounds] for bounds in split(layer.value_dim, parts)]
    return HeadSlices(tuple(qk), tuple(v), tuple(turning), tuple(others), index)


def _moved(parts: list[Bounds], by: int) -> list[Bounds]:
    return [(first + by, last + by) for first, last in parts]


def width(parts: list[Bounds]) -> int:
    """Return the number of elements in some (start, stop)."""
    return sum(last - first for first, last in parts)


def attention_shard(name: str, layer: LayerSpec, local: LocalHeads, slices: HeadSlices) -> Shard:
    """Return the part of an attention weight on the rank with these heads."""

    def of_heads(heads: Bounds, dim: int, parts: list[Bounds]) -> list[Bounds]:
        return joined([(h * dim + a, h * dim + b) for h in range(*heads) for a, b in parts])

    here, name = slices.index, name.removeprefix("attention.")
    q = of_heads(local.q_bounds, layer.head_dim, slices.qk[here])
    k = of_heads(local.kv_bounds, layer.head_dim, slices.qk[here])
    v = of_heads(local.kv_bounds, layer.value_dim, slices.v[here])
    by_output = {"q": q, "k": k, "v": v, "sinks": [local.q_bounds]}
    if layer.qk_norm == "all":
        by_output |= {"q_norm": q, "k_norm": k}
    if layer.latent is not None:
        unrotated = layer.head_dim - layer.rotated_dim
        by_output["k"] = of_heads(local.kv_bounds, unrotated, slices.others[here])
        by_output["k_rotated"] = slices.rotated[here]
    by_input = {"out": of_heads(local.q_bounds, layer.value_dim, slices.v[here])}
    return by_output.get(name.removesuffix("_bias")), by_input.get(name)


def mlp_shard(name: str, hidden: Bounds) -> Shard:
    """Return the part of an MLP weight on the rank with these hidden columns."""
    kind = name.rpartition(".")[2]
    by_output = kind.removesuffix("_bias") in ("up", "gate")
    return [hidden] if by_output else None, [hidden] if kind == "down" else None
