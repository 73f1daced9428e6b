"""Ring attention (`cp`): each rank keeps its queries and attends to the keys of all ranks.

Liu et al. 2023 (arXiv 2310.01889), with the sequence split as in Li et al. 2021. One loop folds
blocks of keys and values into a float32 state that is carried from block to block, so nothing is
merged and the error does not grow with the ring. A block source yields the blocks: sent round the
ring, gathered first, or read in the memory of the other ranks. Under a sliding window the last two
take only the keys that this rank's queries see (see `halo.py`). All sources yield the blocks in the
same order, so the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from pympa.kernels import AttentionSpec, Kernels, KvBlock, State
from pympa.parallel.halo import Part, seen_part, whole
from pympa.parallel.rows import cut_rows
from pympa.plan.accounting import visible_pairs
from pympa.plan.layout import Layout, split
from pympa.runtime.arena import Arena, Array
from pympa.transport import Transport

_FEWEST_ROWS = 512  # each piece packs the keys again, which takes little time for so many rows

Fold = Callable[[KvBlock], None]
"""A function that folds a block of keys and values into the state of this rank's queries."""


@dataclass(frozen=True)
class RingBlocks:
    """The blocks of keys and values on the ranks of a ring, and who needs what of them.

    Attributes:
        transport: the transport between the ranks.
        arena: the memory for received blocks.
        own: the block of this rank.
        layouts: the layout of the block of each rank.
        queries: the layout of the queries of each rank.
        spec: the masks.
    """

    transport: Transport
    arena: Arena
    own: KvBlock
    layouts: Sequence[Layout]
    queries: Sequence[Layout]
    spec: AttentionSpec

    def rank_at(self, step: int) -> int:
        """Return the rank whose block this rank folds at a step."""
        return (self.transport.index - step) % self.transport.size

    def part(self, owner: int, reader: int) -> Part:
        """Return the keys of one rank that another one needs: all of them, without a window."""
        if self.spec.window is None:
            return whole(self.layouts[owner])
        queries, keys = self.queries[reader], self.layouts[owner]
        return seen_part(queries, keys, self.spec.causal, self.spec.window)

    def empty(self, rows: int) -> tuple[Array, Array]:
        """Return memory for received keys and values."""
        k, v = self.own.k, self.own.v
        return (
            self.transport.empty((rows, *k.shape[1:]), k.dtype),
            self.transport.empty((rows, *v.shape[1:]), v.dtype),
        )


Blocks = Generator[KvBlock, None, None]
BlockSource = Callable[[RingBlocks], Blocks]
"""A function that yields this rank's block, then those of the ranks before it. Collective."""


def sent_round_the_ring(ring: RingBlocks) -> Blocks:
    """Send blocks round: while a rank folds one, it sends it on and receives the previous one.

    Whole blocks are sent, also under a window.
    """
    transport, steps = ring.transport, ring.transport.size
    next_rank, previous_rank = ring.rank_at(-1), ring.rank_at(1)
    with ring.arena.scope():
        most_rows = max(layout.rows for layout in ring.layouts)
        buffers = [ring.empty(most_rows) for _ in range(min(steps - 1, 2))]
        held = ring.own
        for step in range(steps):
            incoming, pending = held, None
            if step + 1 < steps:
                layout = ring.layouts[ring.rank_at(step + 1)]
                k, v = buffers[step % 2]
                incoming = KvBlock(k[: layout.rows], v[: layout.rows], layout)
                pending = transport.start(
                    sends=[(held.k, next_rank), (held.v, next_rank)],
                    receives=[(incoming.k, previous_rank), (incoming.v, previous_rank)],
                )
            yield held
            if pending is not None:
                transport.wait(pending)
            held = incoming


def gathered(ring: RingBlocks) -> Blocks:
    """Receive all that this rank needs of the others at once: one round of messages.

    Without a window these are whole blocks, as in Llama 3 (arXiv 2407.21783, section 3.3.2). With
    one they are its halo, sent from rank to rank; rows that lie together are sent as they are.
    """
    transport, own = ring.transport, ring.own
    sends: list[tuple[Array, int]] = []
    receives: list[tuple[Array, int]] = []
    blocks: list[KvBlock] = []
    with ring.arena.scope():
        for step in range(1, transport.size):
            reader, owner = ring.rank_at(-step), ring.rank_at(step)
            given, needed = ring.part(transport.index, reader), ring.part(owner, transport.index)
            for array in (own.k, own.v):
                sends += [(rows, reader) for rows in given.cut(array)]
            if needed.layout.rows:
                arrays = ring.empty(needed.layout.rows)
                blocks.append(KvBlock(*arrays, needed.layout))
                for array in arrays:
                    receives += [(rows, owner) for rows in cut_rows(array, needed.counts)]
        pending = transport.start(sends, receives)
        yield own
        transport.wait(pending)
        yield from blocks


def read_in_place(ring: RingBlocks) -> Blocks:
    """Read what this rank needs of the others in shared memory; nothing is sent."""
    transport, own = ring.transport, ring.own
    shapes = [
        [(layout.rows, *own.k.shape[1:]), (layout.rows, *own.v.shape[1:])]
        for layout in ring.layouts
    ]
    exposure = transport.expose([own.k, own.v], shapes)
    yield own
    arrays = transport.exposed_arrays(exposure)
    read = [0] * transport.size
    for step in range(1, transport.size):
        owner = ring.rank_at(step)
        needed, (k, v) = ring.part(owner, transport.index), arrays[owner]
        if needed.layout.rows:
            read[owner] = needed.layout.rows * ((k.nbytes + v.nbytes) // len(k))
            yield KvBlock(k, v, needed.layout, needed.first_rows)
    transport.end_reading(read)


def attend(
    kernels: Kernels,
    ring: RingBlocks,
    source: BlockSource,
    fold: Fold,
    state: State,
    sinks: Array | None = None,
) -> None:
    """Attend to the keys of all ranks of the ring. Collective.

    Args:
        kernels: the rank's kernels.
        ring: the blocks of the ranks.
        source: the source of the other ranks' blocks.
        fold: a function that folds a block into the state, like `fold_in_pieces`.
        state: the state that gets the attention of this rank's queries to all keys, unfinished.
        sinks: the score of one more key of each head, which has no value `[heads]`; or None.
    """
    with closing(source(ring)) as blocks:
        for step, block in enumerate(blocks):
            if step == 0:
                kernels.start_state(state, sinks)  # while the first messages are in flight
            fold(block)


def fold_in_pieces(
    kernels: Kernels,
    transport: Transport,
    q: Array,
    q_layout: Layout,
    kv: KvBlock,
    spec: AttentionSpec,
    state: State,
) -> None:
    """Fold one block into the state, and poll messages every `kernels.piece_flops`.

    Args:
        kernels: the rank's kernels.
        transport: the ring, whose messages are in flight meanwhile.
        q: the queries `[rows, heads, head_dim]`.
        q_layout: the layout of the queries.
        kv: the block.
        spec: the masks, scale and head map.
        state: the state of `q`.
    """
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
