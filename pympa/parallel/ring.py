"""Ring attention (`cp`): each rank keeps its queries, keys and values travel round the ring.

Liu et al. 2023 (arXiv 2310.01889), with the sequence split as in Li et al. 2021. While a rank
attends to the block it holds, that block is already on its way to the next rank and the following
one comes in from the previous rank. The float32 state is carried from step to step, so nothing is
merged and the error does not grow with the ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pympa.accounting import visible_pairs
from pympa.arena import Arena, Array
from pympa.kernels import AttentionSpec, Kernels, KvBlock, State
from pympa.layout import Layout, split
from pympa.transport import Transport

Attend = Callable[[Array, Layout, KvBlock, State], None]
"""Folds a block of keys into the state of q, whose layout it is given."""

_FEWEST_ROWS = 512  # a piece repacks the keys, which this many query rows pay for


def ring_attention(
    kernels: Kernels,
    transport: Transport,
    arena: Arena,
    q: Array,
    own: KvBlock,
    q_layouts: Sequence[Layout],
    kv_layouts: Sequence[Layout],
    spec: AttentionSpec,
    state: State,
    attend: Attend | None = None,
) -> None:
    """Attend to the keys of all ranks of the ring. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the ring.
        arena: memory for two blocks on their way.
        q: this rank's queries `[rows, heads, head_dim]`.
        own: this rank's keys and values.
        q_layouts: layout of the queries of each rank of the ring.
        kv_layouts: layout of the keys of each rank of the ring.
        spec: masks, scale and head map.
        state: gets the attention of `q` to all keys, unfinished.
        attend: folds one block; None means `attend_in_pieces`.
    """
    size, index = transport.size, transport.index
    next_rank, previous_rank = (index + 1) % size, (index - 1) % size
    steps = _steps(q_layouts, kv_layouts, spec)
    kernels.start_state(state)
    with arena.scope():
        buffers = [_block_buffer(transport, own, kv_layouts) for _ in range(min(steps - 1, 2))]
        held = own
        for step in range(steps):
            incoming, pending = held, None
            if step + 1 < steps:
                layout = kv_layouts[(index - step - 1) % size]
                k, v = buffers[step % 2]
                incoming = KvBlock(k[: layout.rows], v[: layout.rows], layout)
                pending = transport.start(
                    sends=[(held.k, next_rank), (held.v, next_rank)],
                    receives=[(incoming.k, previous_rank), (incoming.v, previous_rank)],
                )
            _attend(kernels, transport, q, q_layouts[index], held, spec, state, attend)
            if pending is not None:
                transport.wait(pending)
            held = incoming


def gathered_attention(
    kernels: Kernels,
    transport: Transport,
    arena: Arena,
    q: Array,
    own: KvBlock,
    q_layouts: Sequence[Layout],
    kv_layouts: Sequence[Layout],
    spec: AttentionSpec,
    state: State,
    attend: Attend | None = None,
) -> None:
    """Do what `ring_attention` does with all keys at hand: gather them first. Collective.

    One round of messages instead of many, and memory for the keys of all ranks (as Llama 3 does,
    arXiv 2407.21783, section 3.3.2). Blocks are folded in the order of the ring, for its bits.
    """
    size, index = transport.size, transport.index
    with arena.scope():
        blocks = [_block_buffer(transport, own, [layout]) for layout in kv_layouts]
        blocks[index] = own.k, own.v
        others = [rank for rank in range(size) if rank != index]
        pending = transport.start(
            sends=[(array, rank) for rank in others for array in blocks[index]],
            receives=[(array, rank) for rank in others for array in blocks[rank]],
        )
        kernels.start_state(state)
        for step in range(size):
            rank = (index - step) % size
            if step == 1:
                transport.wait(pending)
            held = KvBlock(*blocks[rank], kv_layouts[rank])
            _attend(kernels, transport, q, q_layouts[index], held, spec, state, attend)
        if size == 1:
            transport.wait(pending)


def shared_attention(
    kernels: Kernels,
    transport: Transport,
    arena: Arena,
    q: Array,
    own: KvBlock,
    q_layouts: Sequence[Layout],
    kv_layouts: Sequence[Layout],
    spec: AttentionSpec,
    state: State,
    attend: Attend | None = None,
) -> None:
    """Do what `ring_attention` does where ranks can read each other's memory. Collective.

    Nothing is sent: a rank reads the others' blocks where they are, in the order of the ring, and
    then tells them that it has. What a ring would have sent is counted.
    """
    size, index = transport.size, transport.index
    steps = _steps(q_layouts, kv_layouts, spec)
    shapes = [
        [(layout.rows, *own.k.shape[1:]), (layout.rows, *own.v.shape[1:])] for layout in kv_layouts
    ]
    loan = transport.lend([own.k, own.v], shapes)
    kernels.start_state(state)
    held, blocks, received = own, [], 0
    for step in range(steps):
        rank = (index - step) % size
        if step == 1:
            blocks = transport.views(loan)
        if step > 0:
            held = KvBlock(blocks[rank][0], blocks[rank][1], kv_layouts[rank])
            received += held.k.nbytes + held.v.nbytes
        _attend(kernels, transport, q, q_layouts[index], held, spec, state, attend)
    if steps == 1:
        transport.views(loan)
    row = math.prod(own.k.shape[1:]) + math.prod(own.v.shape[1:])
    passed_on = sum(kv_layouts[(index - step) % size].rows for step in range(steps - 1))
    transport.give_back(passed_on * row * own.k.itemsize, received)


def _attend(
    kernels: Kernels,
    transport: Transport,
    q: Array,
    q_layout: Layout,
    held: KvBlock,
    spec: AttentionSpec,
    state: State,
    attend: Attend | None,
) -> None:
    if attend is None:
        attend_in_pieces(kernels, transport, q, q_layout, held, spec, state)
    else:
        attend(q, q_layout, held, state)


def attend_in_pieces(
    kernels: Kernels,
    transport: Transport,
    q: Array,
    q_layout: Layout,
    kv: KvBlock,
    spec: AttentionSpec,
    state: State,
) -> None:
    """Fold one block into the state, looking at messages every `kernels.piece_flops`."""
    pairs = visible_pairs(q_layout, kv.layout, spec.causal, spec.window)
    if pairs == 0:
        return
    flops = 2 * pairs * q.shape[1] * (q.shape[2] + kv.v.shape[2])
    pieces = 1
    if transport.size > 1:
        most = -(-q_layout.rows // _FEWEST_ROWS)
        pieces = max(1, min(most, math.ceil(flops / kernels.piece_flops)))
    for first, last in split(q_layout.rows, pieces):
        rows = q_layout.slice(first, last)
        kernels.attend_block(q[first:last], rows, kv, state.rows(first, last), spec)
        transport.poll()


def _steps(q_layouts: Sequence[Layout], kv_layouts: Sequence[Layout], spec: AttentionSpec) -> int:
    """Return the steps after which no rank of the ring needs another block."""
    size = len(q_layouts)
    if spec.window is None:
        return size
    needed = [
        step
        for step in range(size)
        for rank in range(size)
        if visible_pairs(q_layouts[rank], kv_layouts[rank - step], spec.causal, spec.window)
    ]
    return 1 + max(needed, default=0)


def _block_buffer(
    transport: Transport, own: KvBlock, layouts: Sequence[Layout]
) -> tuple[Array, Array]:
    rows = max(layout.rows for layout in layouts)
    return (
        transport.empty((rows, *own.k.shape[1:]), own.k.dtype),
        transport.empty((rows, *own.v.shape[1:]), own.v.dtype),
    )
