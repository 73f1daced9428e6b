"""q, k and v of a rank's rows: norm, linears, q/k-norm over all heads, latents.

A rank projects slices of heads; RoPE and the norm of single heads need whole heads and come later,
in `pympa.model.attention`, except for what is here because it is the same for all heads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pympa.model.batch import MicroBatch
from pympa.model.layer import Layer
from pympa.parallel.tensor import sum_over_ranks
from pympa.plan.layout import split
from pympa.plan.shares import local_heads
from pympa.runtime.arena import Array
from pympa.spec import Latent

RopeTable = tuple[Array, Array]
"""The tables of cos and sin, float32 `[positions, half]`."""


class Projections:
    """The linears of a layer from its input to slices of q, k and v.

    Args:
        layer: the layer.

    Attributes:
        rotated_later: the names, of q and k, whose whole heads are still to be rotated.
    """

    def __init__(self, layer: Layer) -> None:
        spec = layer.spec
        self._layer = layer
        self._slices = layer.weights.slices[layer.index]
        self._columns = layer.resources.transports["tp"]
        self._dim = layer.resources.transports["dim"]
        self.rotated_later = ("q",) if spec.latent is not None else ("q", "k")
        mesh, heads = layer.resources.mesh, layer.weights.heads[layer.index]
        number, owned_from = mesh.coordinate("tp"), heads.kv_bounds[0]
        if number:  # a kv head that several ranks have counts on the first of them
            before = local_heads(spec, mesh.plan.tp, number - 1)
            owned_from = max(owned_from, before.kv_bounds[1])
        self._shared_kv_heads = min(owned_from, heads.kv_bounds[1]) - heads.kv_bounds[0]

    def __call__(
        self, x: Array, part: MicroBatch, rope: RopeTable | None, out: dict[str, Array]
    ) -> None:
        """Fill slices of q, k and v `[rows, heads, slice]` from the stream x `[rows, d_model]`.

        Collective if q and k have a norm over all heads.

        Args:
            x: the residual stream.
            part: the micro-batch of the rows.
            rope: the tables of cos and sin, or None.
            out: the slices by name.
        """
        layer = self._layer
        for here in layer.chunks(len(x)):
            with layer.arena.scope():
                normed = layer.before("attention", x[here])
                chunk = {name: array[here] for name, array in out.items()}
                latent = layer.spec.latent
                if latent is not None:
                    self._expand(latent, normed, rope, part.position_rows[here], chunk)
                    continue
                for name, rows in chunk.items():
                    self._linear(name, normed, rows)
        if layer.spec.qk_norm == "all":
            with layer.arena.scope():
                self._norm_all_heads(out["q"], out["k"])

    def rotate(
        self, x: Array, rope: RopeTable | None, positions: NDArray[np.int32], *, whole: bool
    ) -> None:
        """Apply RoPE to x `[rows, heads, dim]`, in place.

        Args:
            x: queries or keys.
            rope: the tables of cos and sin, or None.
            positions: each row's row of the tables.
            whole: whether x has whole heads, not this rank's slices.
        """
        spec = self._layer.spec.rope
        if rope is None or spec is None:
            return
        first, last = 0, rope[0].shape[1]
        if not whole:
            first, last = split(last, self._dim.size)[self._dim.index]
        cos, sin = (table[:, first:last] for table in rope)
        if spec.trailing:
            x = x[:, :, x.shape[2] - 2 * (last - first) :]
        self._layer.kernels.rope(x, cos, sin, positions, interleaved=spec.interleaved)

    def _linear(self, name: str, rows: Array, out: Array) -> None:
        """Set out `[rows, heads, dim]` to a linear of rows `[rows, inputs]`."""
        layer = self._layer
        bias = layer.vector(f"attention.{name}_bias")
        flat = out.reshape(len(out), out.shape[1] * out.shape[2])
        layer.kernels.linear(rows, layer.matrix(f"attention.{name}"), flat, bias=bias)

    def _expand(
        self,
        latent: Latent,
        normed: Array,
        rope: RopeTable | None,
        positions: NDArray[np.int32],
        out: dict[str, Array],
    ) -> None:
        """Fill slices of q, k and v of multi-head latent attention.

        normed [rows, d] -> latents [rows, rank] -> q, v, and k without its rotated part; that part
        [rows, slice] is copied to all heads.
        """
        layer, rows, width = self._layer, len(normed), self._slices.rotated_width
        has_q_latent = latent.q_rank is not None
        q_input = self._latent("q_latent", latent, normed) if has_q_latent else normed
        self._linear("q", q_input, out["q"])
        inner = self._latent("kv_latent", latent, normed)
        self._linear("v", inner, out["v"])
        k = out["k"]
        unrotated = layer.arena.empty((*k.shape[:2], k.shape[2] - width), layer.dtype)
        self._linear("k", inner, unrotated)
        layer.kernels.copy(unrotated, k[:, :, : k.shape[2] - width])
        shared = layer.arena.empty((rows, 1, width), layer.dtype)
        self._linear("k_rotated", normed, shared)
        self.rotate(shared, rope, positions, whole=False)
        layer.kernels.copy(shared, k[:, :, k.shape[2] - width :])

    def _latent(self, name: str, latent: Latent, normed: Array) -> Array:
        """Return a latent `[rows, rank]` after its norm."""
        layer, weight = self._layer, self._layer.matrix(f"attention.{name}")
        y = layer.arena.empty((len(normed), weight.n), layer.dtype)
        layer.kernels.linear(normed, weight, y)
        gain = layer.weights.vectors[f"{layer.name}.attention.{name}_norm"]
        layer.kernels.norm(y, gain, None, y, eps=latent.norm_eps, kind="rms")
        return y

    def _norm_all_heads(self, q: Array, k: Array) -> None:
        """Normalise slices of q and k by the mean square over all heads of all ranks. Collective.

        Each rank sums the squares of its slices; the sums of all ranks, float32 `[2 rows, 1]`, are
        gathered and added in rank order.
        """
        layer, kernels, rows = self._layer, self._layer.kernels, len(q)
        spec = layer.spec
        flat = {"q": _flat(q), "k": _flat(k)}
        owned = _flat(k)[:, self._shared_kv_heads * k.shape[2] :]
        squares = layer.arena.empty((2 * rows, 1), np.float32)

        def write(own: Array) -> None:
            kernels.sum_squares(flat["q"], own[:rows])
            kernels.sum_squares(owned, own[rows:])

        sum_over_ranks(kernels, self._columns, write, squares)
        heads = {"q": spec.heads, "k": spec.n_kv_heads}
        for name, sums in (("q", squares[:rows]), ("k", squares[rows:])):
            kernels.norm(
                flat[name],
                layer.weights.vectors[f"{layer.name}.attention.{name}_norm"],
                None,
                flat[name],
                eps=spec.norm_eps,
                kind="rms",
                offset=float(spec.norm_offset),
                squares=sums,
                width=heads[name] * spec.head_dim,
            )


def _flat(array: Array) -> Array:
    return array.reshape(len(array), array.shape[1] * array.shape[2])
