"""Tensor parallelism (`tp`): heads and MLP columns over ranks (Shoeybi et al. 2019).

The first linear of a branch is split by outputs and needs nothing from other ranks; the second is
split by inputs, so its partial results are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pympa.kernels import Kernels
from pympa.plan.layout import split
from pympa.runtime.arena import Arena, Array
from pympa.transport import Transport


def scatter_partials(
    kernels: Kernels, transport: Transport, partial: Array, bias: Array | None, out: Array
) -> None:
    """Set `out` to this rank's share of the rows of the sum of all partials. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the ranks that hold partials.
        partial: the partial of this rank `[rows, d_model]`.
        bias: the bias `[d_model]`, or None.
        out: an output `[share, d_model]` for this rank's share of `split(rows, ranks)`.
    """
    shares = split(len(partial), transport.size)
    parts = transport.empty((transport.size, *out.shape), partial.dtype)
    transport.all_to_all([partial[a:b] for a, b in shares], list(parts))
    kernels.sum_partials(parts, bias, out)


def reduce_partials(
    kernels: Kernels, transport: Transport, partial: Array, bias: Array | None, out: Array
) -> None:
    """Set `out` on all ranks to the sum of their partials, plus bias. Collective.

    Rank i owns the i-th share of the rows: it receives the others' partials of them in the dtype,
    sums in float32 in rank order, adds the bias, rounds once and sends the result to all, so every
    rank has the same bits. Each rank sends 2(p-1)/p of the array, like a ring all-reduce.

    Args:
        kernels: the rank's kernels.
        transport: the ranks that hold partials.
        partial: the partial of this rank `[rows, d_model]`.
        bias: the bias `[d_model]`, or None.
        out: an output `[rows, d_model]`; must not be `partial`.
    """
    shares = [out[a:b] for a, b in split(len(out), transport.size)]
    scatter_partials(kernels, transport, partial, bias, shares[transport.index])
    transport.all_gather(shares)


def sum_over_ranks(
    kernels: Kernels, transport: Transport, write: Callable[[Array], None], out: Array
) -> None:
    """Set `out` on all ranks to the sum of small float32 arrays, in rank order. Collective.

    Each rank sends its whole array to all others, in one round.

    Args:
        kernels: the rank's kernels.
        transport: the ranks.
        write: a function that fills in the array of this rank, of the shape of `out`.
        out: an output `[rows, columns]` float32.
    """
    if transport.size == 1:
        write(out)
        return
    parts = transport.empty((transport.size, *out.shape), out.dtype)
    write(parts[transport.index])
    transport.all_gather(list(parts))
    kernels.sum_partials(parts, None, out)


class Multiply(Protocol):
    """The last product of a branch: a kernel with given rows and weights."""

    def __call__(
        self,
        out: Array,
        *,
        bias: Array | None = None,
        residual: Array | None = None,
        branch: Array | None = None,
    ) -> None:
        """See `Kernels.linear`."""


def add_branch(
    kernels: Kernels,
    transport: Transport,
    arena: Arena,
    multiply: Multiply,
    bias: Array | None,
    stream: Array,
    probe: Callable[[Array], None] | None,
    after: Callable[[Array], Array] | None = None,
) -> None:
    """Add the result of `multiply`, summed over the ranks, plus bias to the residual stream.

    Collective.

    Args:
        kernels: the rank's kernels.
        transport: the ranks that share the inputs of the last weight.
        arena: the memory for the branch.
        multiply: a function like `Kernels.linear` or `Kernels.mlp` with given inputs.
        bias: the bias `[d_model]`, or None.
        stream: the residual stream `[rows, d_model]`, updated in place.
        probe: a function to call with the branch before it is added, or None.
        after: a function that returns the branch as it is added, such as a norm of it; or None.
    """
    with arena.scope():
        if transport.size == 1 and after is None:
            branch = arena.empty(stream.shape, stream.dtype) if probe else None
            multiply(stream, bias=bias, residual=stream, branch=branch)
        else:
            branch = transport.empty(stream.shape, stream.dtype)
            if transport.size == 1:
                multiply(branch, bias=bias)
            else:
                partial = transport.empty(stream.shape, stream.dtype)
                multiply(partial)
                reduce_partials(kernels, transport, partial, bias, branch)
            branch = branch if after is None else after(branch)
            kernels.add(stream, branch, stream)
        if probe and branch is not None:
            probe(branch)
