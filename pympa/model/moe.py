"""The expert branch: x + sum of gate weight · expert(norm(x)) over the experts of each row.

Ranks that hold the same rows (`tp`) route a slice of them each. There are as many slices as groups
of `etp` among these ranks; the ranks of an `etp` group have the same slice, and each has a part of
each expert's columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pympa.model.batch import MicroBatch
from pympa.model.layer import Layer, Probe
from pympa.parallel.capacity import Capacity
from pympa.parallel.experts import (
    Base,
    Dispatch,
    ExpertGroup,
    Routes,
    dispatch_chunks,
    run_experts,
)
from pympa.parallel.tensor import scatter_partials
from pympa.plan.layout import Layout, split
from pympa.runtime.arena import Array


class Moe:
    """The second branch of a layer with experts.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        transports = layer.resources.transports
        self._cp, self._tp = transports["cp"], transports["tp"]
        self._ep, self._etp = transports["ep"], transports["etp"]
        self._group = ExpertGroup(layer.kernels, self._ep, layer.arena, layer.spec.experts)

    def __call__(
        self,
        x: Array,
        read: Array,
        part: MicroBatch,
        capacity: Capacity,
        probe: Probe | None,
    ) -> None:
        """Add the experts: read [rows, d] -> rows by expert -> hidden -> x [rows, d]. Collective.

        Args:
            x: the residual stream.
            read: the rows that the branch reads: x, or the stream before the block.
            part: the micro-batch of the rows.
            capacity: the used capacity of the layer's experts in this step.
            probe: a function that gets the chosen experts and the branch, or None.
        """
        layer, kernels = self._layer, self._layer.kernels
        plan = layer.resources.mesh.plan
        routed_rows, summed_rows = self._split_rows(len(x))
        with layer.arena.scope():
            normed, routes = self._route(read, routed_rows, part, capacity, probe)
            branch = self._tp.empty(x.shape, layer.dtype)
            whole = self._etp.size == 1
            partial = branch[routed_rows] if whole else self._etp.empty(normed.shape, layer.dtype)
            with layer.arena.scope():
                base = self._shared_experts(normed)
                chunks = dispatch_chunks(plan, part.most_rows, kernels.dispatch_rows)
                dispatch = Dispatch(self._group, normed, routes, chunks)
                run_experts(dispatch, self._compute, base, partial)
            if self._etp.index == 0:
                layer.resources.load.add(layer.index, dispatch.rows)
            if not whole:
                own_sum = branch[summed_rows[self._tp.index]]
                scatter_partials(kernels, self._etp, partial, None, own_sum)
            self._tp.all_gather([branch[rows] for rows in summed_rows])
            branch = layer.after("mlp", branch)
            on_branch = layer.probed(probe, "mlp", part.layout)
            if on_branch is not None:
                on_branch(branch)
            kernels.add(x, branch, x)

    def _split_rows(self, rows: int) -> tuple[slice, list[slice]]:
        """Return the rows that this rank routes, and the rows whose sum each `tp` rank computes."""
        slices = split(rows, self._tp.size // self._etp.size)
        summed = [
            slice(start + first, start + last)
            for start, stop in slices
            for first, last in split(stop - start, self._etp.size)
        ]
        return slice(*slices[self._tp.index // self._etp.size]), summed

    def _route(
        self,
        x: Array,
        own_rows: slice,
        part: MicroBatch,
        capacity: Capacity,
        probe: Probe | None,
    ) -> tuple[Array, Routes]:
        """Return the normed rows of this rank's slice and their experts.

        With a capacity, whether a row is dropped depends on all rows before it, so all are routed.
        """
        layer = self._layer
        limited = layer.spec.capacity_factor is not None
        routed = slice(0, len(x)) if limited else own_rows
        layout = part.layout.slice(routed.start, routed.stop)
        normed = layer.before("mlp", x[routed])
        routes = self._select(normed, layout)
        on_routing = layer.probed(probe, "routing", part.layout, own_rows)
        if on_routing is not None and self._etp.index == 0:
            first = routed.start
            on_routing(routes.experts[own_rows.start - first : own_rows.stop - first])
        if limited:
            dropped = capacity.drop_overflow(layer.kernels, self._cp, routes.experts, part.layouts)
            if self._tp.index == 0:
                layer.resources.load.drop(layer.index, dropped)
            return normed[own_rows], routes.rows(own_rows)
        return normed, routes

    def _select(self, normed: Array, layout: Layout) -> Routes:
        """Choose the experts of normed rows `[rows, d_model]`.

        Raises:
            ValueError: a row has a gate logit that is not finite.
        """
        layer, kernels, arena, rows = (
            self._layer,
            self._layer.kernels,
            self._layer.arena,
            len(normed),
        )
        routes = Routes(
            arena.empty((rows, layer.spec.top_k), np.int32),
            arena.empty((rows, layer.spec.top_k), np.float32),
        )
        with arena.scope():
            logits = arena.empty((rows, layer.spec.experts), np.float32)
            router, bias = layer.matrix("router"), layer.vector("router_bias")
            kernels.linear(normed, router, logits, bias=bias)
            wrong = kernels.select_experts(
                logits,
                *routes,
                renormalize=layer.spec.renormalize,
                routing=layer.spec.routing,
                choice_bias=layer.vector("choice_bias"),
            )
        if wrong >= 0:
            where = layout.slice(wrong, wrong + 1).ranges[0]
            raise ValueError(
                f"{layer.name}.router: expected finite gate logits; got others at position "
                f"{where.start} of sequence {where.sequence}"
            )
        return routes

    def _shared_experts(self, normed: Array) -> Base | None:
        """Return the shared experts' partial result from this rank's columns, or None."""
        layer, gate = self._layer, None
        if not layer.spec.shared_experts:
            return None
        out = layer.arena.empty(normed.shape, layer.dtype)
        if layer.spec.shared_gate:
            gate = layer.arena.empty((len(normed), 1), np.float32)
            layer.kernels.linear(normed, layer.matrix("shared_gate"), gate)
        weights = layer.mlp("shared")
        bias = layer.vector("shared.down_bias") if self._etp.index == 0 else None
        for here in layer.chunks(len(normed)):
            layer.kernels.mlp(normed[here], weights, out[here], bias=bias)
        return Base(out, gate)

    def _compute(self, rows: Array, group_rows: NDArray[np.int64]) -> None:
        """Replace rows `[rows, d]`, sorted by expert, by the experts' outputs."""
        layer = self._layer
        weights = layer.mlp("experts")
        bias = layer.vector("experts.down_bias") if self._etp.index == 0 else None
        ends = np.cumsum(group_rows)
        for here in layer.chunks(len(rows)):
            bounds = np.clip(np.concatenate([[0], ends]), here.start, here.stop)
            groups = bounds[1:] - bounds[:-1]
            chunk = rows[here]
            layer.kernels.mlp(chunk, weights, chunk, bias=bias, group_rows=groups)
            self._ep.poll()
