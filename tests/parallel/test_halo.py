"""The halo of a window: which keys it is, and the same bits however they come."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pympa.kernels import AttentionSpec, KvBlock, State
from pympa.kernels.cpu import CpuKernels
from pympa.parallel.halo import seen_part, whole
from pympa.parallel.ring import (
    RingBlocks,
    attend,
    fold_in_pieces,
    gathered,
    read_in_place,
    sent_round_the_ring,
)
from pympa.plan.comm_volume import comm_volume
from pympa.plan.layout import Layout, Range, split_batch, split_tokens
from pympa.plan.mesh import Plan, parse_plan
from pympa.plan.rings import needed_keys
from pympa.runtime.arena import Arena
from pympa.runtime.trace import Trace
from pympa.runtime.traffic import Traffic
from pympa.spec import DTYPES
from pympa.transport import Transport
from pympa.transport.local import LocalEndpoint, LocalWorld
from support import worlds
from support.compare import assert_same_bits, normal
from support.lanes import lanes

layouts = st.lists(
    st.builds(Range, st.integers(0, 2), st.integers(0, 30), st.integers(1, 12)), max_size=5
).map(lambda ranges: Layout(()).then(Layout(tuple(ranges))))


def tokens(layout: Layout) -> list[tuple[int, int]]:
    """Return (sequence, position) of each row."""
    return [(r.sequence, r.start + i) for r in layout.ranges for i in range(r.length)]


def seen_rows(q: Layout, k: Layout, causal: bool, window: int) -> list[int]:
    """Return the rows of keys that some query sees, by trying every pair."""

    def sees(query: tuple[int, int], key: tuple[int, int]) -> bool:
        distance = query[1] - key[1]
        return query[0] == key[0] and abs(distance) < window and (distance >= 0 or not causal)

    queries = tokens(q)
    return [row for row, key in enumerate(tokens(k)) if any(sees(query, key) for query in queries)]


@given(layouts, layouts, st.booleans(), st.integers(1, 20))
def test_the_part_of_a_block_is_what_some_query_sees(q, k, causal, window):
    part, rows = seen_part(q, k, causal, window), seen_rows(q, k, causal, window)
    ranges = zip(part.first_rows.tolist(), part.layout.ranges, strict=True)
    assert [row + i for row, r in ranges for i in range(r.length)] == rows
    assert [row for bounds in part.bounds for row in range(*bounds)] == rows
    assert tokens(part.layout) == [tokens(k)[row] for row in rows]
    assert len(part.bounds) == sum(row - 1 not in rows for row in rows), "none adjoins another"
    assert np.concatenate([np.empty(0), *part.cut(np.arange(k.rows))]).tolist() == rows
    assert part.counts == [last - first for first, last in part.bounds]


@given(layouts, layouts, st.booleans(), st.integers(1, 20))
def test_what_the_closed_form_counts_is_that(q, k, causal, window):
    assert needed_keys(q, k, causal, window) == seen_part(q, k, causal, window).layout
    assert needed_keys(q, k, causal, None) == k == whole(k).layout
    assert [row for bounds in whole(k).bounds for row in range(*bounds)] == [*range(k.rows)]


@given(layouts, layouts, st.integers(1, 20), st.data())
def test_a_slice_of_a_block_that_names_its_rows(q, k, window, data):
    part, keys = seen_part(q, k, True, window), np.arange(k.rows).reshape(-1, 1, 1)
    block = KvBlock(keys, keys, part.layout, part.first_rows)
    start = data.draw(st.integers(0, part.layout.rows))
    stop = data.draw(st.integers(start, part.layout.rows))
    found = block.slice(start, stop)
    rows = [row + i for _, _, n, row in found.ranges.tolist() for i in range(n)]
    assert rows == seen_rows(q, k, True, window)[start:stop]
    assert tokens(found.layout) == tokens(part.layout)[start:stop]
    packed = KvBlock(keys, keys, k).slice(start, stop)
    assert packed.k.ravel().tolist() == [*range(k.rows)][start:stop]


@pytest.mark.parametrize("source", [gathered, read_in_place])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", lanes([1, 40, 300, 700, 5000], [1, 3]))
@pytest.mark.parametrize("balance", ["zigzag", "contiguous"])
@pytest.mark.parametrize("dtype", lanes(["float32", "float16", "bfloat16"], [0, 2]))
def test_a_halo_gives_the_bits_of_whole_blocks(dtype, balance, window, causal, source):
    """A block may begin anywhere in a tile of keys: the keys that are not there were masked."""
    size, lengths = 4, (1500, 3, 700)
    of_ranks = split_tokens(split_batch(lengths, 1)[0], size, balance)
    spec = AttentionSpec(np.array([0, 0, 1], np.int32), 0.25, causal, window=window, softcap=30.0)
    rng = np.random.default_rng(1)
    batch = [normal(rng, (sum(lengths), heads, 16), DTYPES[dtype]) for heads in (3, 2, 2)]

    def run(source):
        def body(endpoint: LocalEndpoint):
            own, arena, traffic = of_ranks[endpoint.rank], Arena(), Traffic()
            rows = own.global_rows(lengths)
            q, k, v = (arena.empty((len(rows), *x.shape[1:]), x.dtype, shared=True) for x in batch)
            for array, x in zip((q, k, v), batch, strict=True):
                array[...] = x[rows]
            kernels = CpuKernels(isa=worlds.ISA, threads=2, arena=arena, trace=Trace())
            transport = Transport(endpoint, "cp", range(size), arena, Trace(), traffic)
            ring = RingBlocks(transport, arena, KvBlock(k, v, own), of_ranks, of_ranks, spec)
            state = State(*np.empty((2, len(rows), 3), np.float32), np.empty(q.shape, np.float32))

            def fold(kv: KvBlock) -> None:
                fold_in_pieces(kernels, transport, q, own, kv, spec, state)

            attend(kernels, ring, source, fold, state)
            transport.wait_for_readers()
            return state

        return LocalWorld(size, seed=1, shares_memory=True).run(body)

    for halo, blocks in zip(run(source), run(sent_round_the_ring), strict=True):
        for one, other in zip(halo, blocks, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16"], [1]))
@pytest.mark.parametrize(
    "text",
    ["cp=4", "cp=4,balance=contiguous", "cp=3,micro_batches=9", "cp=4,ulysses=2,micro_batches=3",
     "cp=3,dim=2", "cp=2,dim=3,dim_algo=gather", "cp=3,dim=2,dim_algo=reduce", "cp=9,tp=2"],
)  # fmt: skip
def test_keys_come_in_three_ways(text, dtype):
    """By messages, read in place, and gathered: the same bits, and the bytes of the formula."""
    plan = parse_plan(text)
    gathers = msgspec.structs.replace(plan, cp_scheme="allgather")
    ways = [(plan, False), (plan, True), (gathers, False)]
    runs = []
    for seed, (way, shares_memory) in enumerate(ways):
        outputs, ranks = worlds.run_local(
            worlds.SLIDING, way, dtype=dtype, seed=seed, shares_memory=shares_memory
        )
        moved = worlds.sent_by_axis(ranks), worlds.by_axis(rank.traffic.read for rank in ranks)
        assert moved == comm_volume(
            worlds.SLIDING, way, worlds.LENGTHS, DTYPES[dtype].itemsize, shares_memory=shares_memory
        )
        runs.append(outputs)
    assert worlds.judge(worlds.SLIDING, runs[0], dtype=dtype).passed
    for other in runs[1:]:
        worlds.assert_same_bits(other, runs[0])


def test_a_window_is_sent_to_the_next_rank():
    """Chunks of 8 tokens and a window of 6: the next rank sees the last 5 keys of each."""
    layer = msgspec.structs.replace(worlds.WINDOWED.layers[0], window=6)
    spec = msgspec.structs.replace(worlds.WINDOWED, layers=(layer,))
    outputs, ranks = worlds.run_local(spec, Plan(cp=8, balance="contiguous"), (64,))
    assert worlds.judge(spec, outputs, (64,)).passed
    sent = 5 * 4 * (8 + 8) * 4 * layer.repeat
    assert [rank.traffic.sent for rank in ranks] == [*({("cp", r): sent} for r in range(1, 8)), {}]


@pytest.mark.parametrize("causal", [True, False])
def test_zigzag_sends_to_neighbours_in_position(causal):
    """64 tokens in 16 pieces of 4, a window of 5: only the pieces beside a piece see it."""
    layer = msgspec.structs.replace(worlds.WINDOWED.layers[0], window=5)
    spec = msgspec.structs.replace(worlds.WINDOWED, layers=(layer,), causal=causal)
    outputs, ranks = worlds.run_local(spec, Plan(cp=8), (64,))
    assert worlds.judge(spec, outputs, (64,)).passed
    piece = 4 * 4 * (8 + 8) * 4 * layer.repeat
    for number, rank in enumerate(ranks):
        # Its pieces are `number` and 15 - number. One of them is before a piece of the next rank,
        # the other after one of it, and the other way round for the rank before.
        beside = [peer for peer in (number - 1, number + 1) if 0 <= peer < 8]
        assert rank.traffic.sent == {("cp", peer): piece * (1 if causal else 2) for peer in beside}
