"""Who holds what of a layer: heads over `tp`, slices of heads over `dim`, columns over both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pympa.layout import Span, joined, split
from pympa.spec import LayerSpec

Shard = tuple[list[Span] | None, list[Span] | None]
"""Spans of a weight's rows and of its columns; None means all."""


@dataclass(frozen=True)
class HeadShare:
    """The heads of one rank: any number of query heads, and the kv heads that they read."""

    q_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    kv_head_of_q: NDArray[np.int32]

    @property
    def heads(self) -> int:
        """Local query heads."""
        return self.q_heads[1] - self.q_heads[0]

    @property
    def n_kv_heads(self) -> int:
        """Local key/value heads; a kv head that several ranks need is on each of them."""
        return self.kv_heads[1] - self.kv_heads[0]


def head_share(layer: LayerSpec, parts: int, index: int) -> HeadShare:
    """Return the heads of rank `index` of `parts`."""
    first, last = split(layer.heads, parts)[index]
    needed = [layer.kv_head_of(head) for head in range(first, last)]
    kv_first, kv_last = needed[0], needed[-1] + 1
    return HeadShare((first, last), (kv_first, kv_last), np.array(needed, np.int32) - kv_first)


@dataclass(frozen=True)
class HeadSlices:
    """How the `dim` ranks slice a head: spans of its dimensions by rank, and this rank's index."""

    qk: tuple[list[Span], ...]
    v: tuple[list[Span], ...]
    index: int

    @property
    def qk_width(self) -> int:
        """Dimensions of this rank's slice of a query or key."""
        return width(self.qk[self.index])

    @property
    def v_width(self) -> int:
        """Dimensions of this rank's slice of a value."""
        return width(self.v[self.index])


def slice_heads(layer: LayerSpec, parts: int, index: int) -> HeadSlices:
    """Return the slices of rank `index` of `parts`.

    A pair of dimensions that RoPE turns together stays together, so a slice can be turned alone.
    """
    rotated, half = layer.rotated_dim, layer.rotated_dim // 2
    turned, rest = split(half, parts), split(layer.head_dim - rotated, parts)
    qk = tuple(
        joined([(a, b), (half + a, half + b), (rotated + c, rotated + d)])
        for (a, b), (c, d) in zip(turned, rest, strict=True)
    )
    return HeadSlices(qk, tuple([span] for span in split(layer.value_dim, parts)), index)


def width(spans: list[Span]) -> int:
    """Return how much spans cover."""
    return sum(last - first for first, last in spans)


def attention_shard(name: str, layer: LayerSpec, share: HeadShare, slices: HeadSlices) -> Shard:
    """Return the part of an attention weight that the rank with these heads holds."""

    def of_heads(heads: Span, dim: int, spans: list[Span]) -> list[Span]:
        return joined([(h * dim + a, h * dim + b) for h in range(*heads) for a, b in spans])

    by_output = {
        "attention.q": of_heads(share.q_heads, layer.head_dim, slices.qk[slices.index]),
        "attention.k": of_heads(share.kv_heads, layer.head_dim, slices.qk[slices.index]),
        "attention.v": of_heads(share.kv_heads, layer.value_dim, slices.v[slices.index]),
    }
    by_input = {"attention.out": of_heads(share.q_heads, layer.value_dim, slices.v[slices.index])}
    return by_output.get(name.removesuffix("_bias")), by_input.get(name)


def mlp_shard(name: str, hidden: Span) -> Shard:
    """Return the part of an MLP weight that the rank with these hidden columns holds."""
    kind = name.rpartition(".")[2]
    by_output = kind.removesuffix("_bias") in ("up", "gate")
    return [hidden] if by_output else None, [hidden] if kind == "down" else None
