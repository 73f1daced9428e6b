"""Ranks that do the same work on shapes, so that one of them can be run for all.

A key holds every number of a rank that sizes an array: widths of weights, heads, rows, shares of
rows and the rows of experts. Ranks with equal keys hold and send arrays of the same sizes. What
depends on positions, as the split of a sequence, stays apart: then the coordinate is in the key.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache, partial

from pympa.footprint.rehearsal import Rehearsal
from pympa.parallel.experts import dispatch_chunks
from pympa.plan.layout import split, split_batch, split_micro_batches, split_tokens
from pympa.plan.mesh import Mesh, Plan
from pympa.plan.shares import local_heads
from pympa.spec import LayerSpec, ModelSpec


def first_alike(rehearsal: Rehearsal, lengths: Sequence[int]) -> list[int]:
    """Return for each rank the first one that does the same work on shapes, maybe itself.

    Args:
        rehearsal: the rehearsal of any rank of the plan; no ranks share memory in it.
        lengths: the number of tokens of each sequence.
    """
    spec, plan, kernels = rehearsal.model.spec, rehearsal.model.mesh.plan, rehearsal.kernels
    layers = tuple(dict.fromkeys(spec.layers))
    if any(layer.capacity_factor is not None for layer in layers):
        return list(range(plan.world))
    rows = rows_of_ranks(plan, lengths)
    most = [max(counts) for counts in zip(*(r for of_cp in rows for r in of_cp), strict=True)]
    chunks = [dispatch_chunks(plan, m, kernels.dispatch_rows) for m in most]
    of_weights = lru_cache(maxsize=None)(partial(_weights_key, spec, plan, layers))
    of_rows = lru_cache(maxsize=None)(
        partial(_rows_key, plan, layers, tuple(chunks), kernels.row_chunk)
    )
    of_group = [tuple(lengths[first:last]) for first, last in split(len(lengths), plan.dp)]
    first: dict[Hashable, int] = {}
    found = []
    for rank in range(plan.world):
        mesh = Mesh(plan, rank)
        group, at = mesh.coordinate("dp"), mesh.coordinate("cp")
        columns, expert = mesh.coordinate("columns"), mesh.coordinate("ep")
        etp = mesh.coordinate("etp")
        key = (
            mesh.coordinate("pp"),
            of_group[group],
            at,
            of_weights(columns, expert, etp),
            of_rows(rows[group][at], columns, expert),
        )
        found.append(first.setdefault(key, rank))
    return found


def rows_of_ranks(plan: Plan, lengths: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Return the rows of each micro-batch, by `dp` group and `cp` rank.

    Args:
        plan: the plan.
        lengths: the number of tokens of each sequence.
    """
    found = []
    for group in split_batch(lengths, plan.dp):
        parts = split_micro_batches(group, plan.micro_batches)
        layouts = (split_tokens(part, plan.cp, plan.balance) for part in parts)
        found.append(list(zip(*([part.rows for part in of] for of in layouts), strict=True)))
    return found


def _weights_key(
    spec: ModelSpec,
    plan: Plan,
    layers: Sequence[LayerSpec],
    columns: int,
    expert: int,
    etp: int,
) -> Hashable:
    """Return the sizes of a rank's weights and heads."""
    whole = plan.degree("columns")
    slices = columns if plan.dim > 1 else 0
    # A norm over all heads counts a kv head that several ranks have on the first of them only.
    heads = columns if any(layer.qk_norm == "all" for layer in layers) else 0
    sizes: list[Hashable] = [slices, heads, etp == 0, _share(spec.vocabulary, whole, columns)]
    for layer in layers:
        local = local_heads(layer, plan.tp, columns // plan.dim)
        sizes += [local.heads, local.kv_heads, local.kv_head_of_q.tobytes()]
        if layer.experts:
            sizes.append(_share(layer.experts, plan.ep, expert))
            parts, index = plan.expert_columns, etp
            sizes.append(_share(layer.shared_width, parts, index))
        else:
            parts, index = whole, columns
        sizes.append(_share(layer.mlp_hidden, parts, index))
    return tuple(sizes)


def _rows_key(
    plan: Plan,
    layers: Sequence[LayerSpec],
    chunks: Sequence[int],
    row_chunk: int,
    rows: Sequence[int],
    columns: int,
    expert: int,
) -> Hashable:
    """Return the rows that a rank sums for others, and those that its experts get."""
    whole, etp = plan.degree("columns"), plan.expert_columns
    routed = [layer for layer in layers if layer.experts]
    sizes: list[Hashable] = []
    for count, parts in zip(rows, chunks, strict=True):
        sizes += [_share(n, whole, columns) for n in (count, row_chunk, count % row_chunk)]
        if routed:
            own = _share(count, max(whole // etp, 1), columns // etp)
            sizes += [own, _share(own, etp, columns % etp)]
            for layer in routed:
                sizes.append(_expert_rows(layer, plan.ep, expert, own, parts))
    return tuple(sizes)


@lru_cache(maxsize=4096)
def _expert_rows(layer: LayerSpec, ep: int, expert: int, rows: int, chunks: int) -> Hashable:
    """Return the rows of each expert of a rank in a chunk of the larger and the smaller size.

    Routing is even; what remains goes to the first experts, as in `VirtualKernels`.
    """
    first, last = split(layer.experts, ep)[expert]
    sizes = sorted({b - a for a, b in split(rows, chunks)})
    return tuple(
        tuple(
            (size * layer.top_k + layer.experts - 1 - e) // layer.experts
            for e in range(first, last)
        )
        for size in sizes
    )


def _share(total: int, parts: int, index: int) -> int:
    """Return the size of a share of `split`."""
    return total // parts + (index < total % parts)
