"""The expert branch: x + sum of gate weight · expert(norm(x)) over the experts of each row.

Ranks that hold the same rows (`tp`) take a slice of them each, as many slices as there are groups
of `etp` among them; the ranks of an `etp` group take the same slice and a part of each expert's
columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array
from pympa.batch import MicroBatch
from pympa.block.context import Context, Probe
from pympa.layout import Layout, split
from pympa.parallel.capacity import Capacity
from pympa.parallel.experts import Routes, run_experts
from pympa.parallel.tensor import scatter_partials
from pympa.volume import dispatch_chunks


class Moe:
    """The second branch of a block with experts.

    Args:
        context: the block.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        transports = context.rank.transports
        self._cp, self._tp = transports["cp"], transports["tp"]
        self._ep, self._etp = transports["ep"], transports["etp"]

    def __call__(self, x: Array, part: MicroBatch, capacity: Capacity, probe: Probe | None) -> None:
        """Add the experts: x [rows, d] -> rows by expert -> hidden -> [rows, d].

        Args:
            x: residual stream.
            part: which tokens the rows are.
            capacity: of the layer's experts in this step.
            probe: sees the choices of experts and the branch, or None.
        """
        context = self._context
        mine, pieces = self._shares(len(x))
        with context.arena.scope():
            normed, routes = self._route(x, mine, part, capacity, probe)
            branch = self._tp.empty(x.shape, context.dtype)
            whole = self._etp.size == 1
            partial = branch[mine] if whole else self._etp.empty(normed.shape, context.dtype)
            with context.arena.scope():
                rows = run_experts(
                    context.kernels,
                    self._ep,
                    context.arena,
                    normed,
                    routes,
                    experts=context.layer.experts,
                    chunks=dispatch_chunks(
                        context.rank.mesh.plan, part.most_rows, context.kernels.dispatch_rows
                    ),
                    compute=self._compute,
                    base=self._shared_experts(normed),
                    out=partial,
                )
            if self._etp.index == 0:
                context.rank.load.add(context.index, rows)
            if not whole:
                scatter_partials(
                    context.kernels, self._etp, partial, None, branch[pieces[self._tp.index]]
                )
            self._tp.all_gather([branch[piece] for piece in pieces])
            if probe is not None:
                probe(f"{context.name}.mlp", branch, part.layout)
            context.kernels.add(x, branch, x)

    def _shares(self, rows: int) -> tuple[slice, list[slice]]:
        """Return the rows that this rank routes, and those whose sum each `tp` rank makes."""
        slices = split(rows, self._tp.size // self._etp.size)
        pieces = [
            slice(start + first, start + last)
            for start, stop in slices
            for first, last in split(stop - start, self._etp.size)
        ]
        return slice(*slices[self._tp.index // self._etp.size]), pieces

    def _route(
        self, x: Array, mine: slice, part: MicroBatch, capacity: Capacity, probe: Probe | None
    ) -> tuple[Array, Routes]:
        """Return the normed rows of this rank's slice and their experts.

        Under a capacity a row's fate depends on all rows before it, so all are routed.
        """
        context, layer = self._context, self._context.layer
        limited = layer.capacity_factor is not None
        routed = slice(0, len(x)) if limited else mine
        layout = part.layout.slice(routed.start, routed.stop)
        normed = context.normed("mlp_norm", x[routed])
        routes = self._select(normed, layout)
        if probe is not None and self._etp.index == 0:
            own = slice(mine.start - routed.start, mine.stop - routed.start)
            probe(
                f"{context.name}.routing",
                routes.experts[own],
                part.layout.slice(mine.start, mine.stop),
            )
        if limited:
            dropped = capacity.drop_overflow(
                context.kernels, self._cp, routes.experts, part.layouts
            )
            if self._tp.index == 0:
                context.rank.load.drop(context.index, dropped)
            return normed[mine], routes.rows(mine)
        return normed, routes

    def _select(self, normed: Array, layout: Layout) -> Routes:
        """Choose the experts of normed rows `[rows, d_model]`.

        Raises:
            ValueError: a row has a gate logit that is not finite.
        """
        context, layer, rows = self._context, self._context.layer, len(normed)
        routes = Routes(
            context.arena.empty((rows, layer.top_k), np.int32),
            context.arena.empty((rows, layer.top_k), np.float32),
        )
        with context.arena.scope():
            logits = context.arena.empty((rows, layer.experts), np.float32)
            router, bias = context.matrix("router"), context.vector("router_bias")
            context.kernels.linear(normed, router, logits, bias=bias)
            wrong = context.kernels.select_experts(logits, *routes, renormalize=layer.renormalize)
        if wrong >= 0:
            where = layout.slice(wrong, wrong + 1).ranges[0]
            raise ValueError(
                f"{context.name}.router: expected finite gate logits; those of position "
                f"{where.start} of sequence {where.sequence} are not"
            )
        return routes

    def _shared_experts(self, normed: Array) -> Array | None:
        """Return the part of the shared experts that this rank's columns give, or None."""
        context = self._context
        if not context.layer.shared_experts:
            return None
        out = context.arena.empty(normed.shape, context.dtype)
        weights = context.mlp("shared")
        bias = context.vector("shared.down_bias") if self._etp.index == 0 else None
        for here in context.chunks(len(normed)):
            context.kernels.mlp(normed[here], weights, out[here], bias=bias)
        return out

    def _compute(self, rows: Array, group_rows: NDArray[np.int64]) -> None:
        """Replace rows `[rows, d]`, sorted by expert, by its outputs."""
        context = self._context
        weights = context.mlp("experts")
        bias = context.vector("experts.down_bias") if self._etp.index == 0 else None
        ends = np.cumsum(group_rows)
        for here in context.chunks(len(rows)):
            bounds = np.clip(np.concatenate([[0], ends]), here.start, here.stop)
            groups = bounds[1:] - bounds[:-1]
            part = rows[here]
            context.kernels.mlp(part, weights, part, bias=bias, group_rows=groups)
            self._ep.poll()
