"""Rank threads: transport, half precision, masks, delays, deadlocks."""

import msgspec
import numpy as np
import pytest

from pympa.kernels import AttentionSpec, KvBlock, State
from pympa.kernels.cpu import CpuKernels
from pympa.parallel.ring import (
    RingBlocks,
    attend,
    fold_in_pieces,
    gathered,
    sent_round_the_ring,
)
from pympa.plan.layout import Layout, Range, split_tokens
from pympa.plan.mesh import Plan
from pympa.runtime.arena import Arena
from pympa.runtime.trace import Trace
from pympa.spec import DTYPES
from pympa.transport.endpoint import TransportError
from pympa.transport.local import LocalEndpoint, LocalWorld
from support import checks, worlds
from support.lanes import lanes


@pytest.mark.parametrize("seed", lanes([None, 1, 2], [0, 1]))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("check", checks.EVERYWHERE)
def test_transport(check, size, seed):
    LocalWorld(size, seed=seed).run(check)


@pytest.mark.parametrize("dtype", lanes(["float16", "bfloat16"], [1]))
@pytest.mark.parametrize(
    "plan",
    [Plan(cp=16), Plan(tp=8, pp=2), Plan(tp=2, pp=2, cp=2, dp=2), Plan(cp=3, balance="contiguous"),
     Plan(tp=4, dim=4), Plan(dim=4, dim_algo="gather"), Plan(tp=2, dim=2, dim_algo="reduce"),
     Plan(cp=6, cp_scheme="ulysses"), Plan(cp=4, ulysses=2, dim=2)],
    ids=str,
)  # fmt: skip
def test_half_precision(plan, dtype):
    LocalWorld(plan.world).run(lambda e: checks.plan_is_exact(e, worlds.DENSE, plan, dtype))


@pytest.mark.parametrize("spec", [worlds.WINDOWED, worlds.NOT_CAUSAL], ids=["window", "full"])
@pytest.mark.parametrize("size", lanes([1, 3, 4, 6], [1, 2]))
@pytest.mark.parametrize("balance", ["zigzag", "contiguous"])
def test_masks(balance, spec, size):
    for plan in (
        Plan(cp=size, balance=balance),
        Plan(dp=size),
        Plan(cp=size, tp=2, balance=balance),
        Plan(cp=size, dim=2, balance=balance),
        Plan(cp=size, dim=2, dim_algo="reduce", balance=balance),
        Plan(cp=size, balance=balance, cp_scheme="allgather"),
        Plan(cp=2 * size, ulysses=2, balance=balance),
    ):
        outputs, _ = worlds.run_local(spec, plan, seed=size)
        assert worlds.judge(spec, outputs).passed, str(plan)


@pytest.mark.parametrize("plan", [Plan(tp=5), Plan(tp=2, cp=2), Plan(tp=6, pp=2)], ids=str)
def test_one_kv_head_for_all_tp_ranks(plan):
    LocalWorld(plan.world, seed=1).run(lambda e: checks.plan_is_exact(e, worlds.MULTI_QUERY, plan))


@pytest.mark.parametrize("broken", [63, 31, 0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("balance", ["contiguous", "zigzag"])
@pytest.mark.parametrize("source", [sent_round_the_ring, gathered])
@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16"], [1]))
def test_nan_reaches_only_rows_that_see_it(dtype, source, balance, window, broken):
    """Of 64 tokens on 4 ranks, whatever the order in which keys come round."""
    ones = np.ones((64, 1, 16), DTYPES[dtype])
    spec = AttentionSpec(np.zeros(1, np.int32), 0.25, True, window=window)
    layouts = split_tokens(Layout((Range(0, 0, 64),)), 4, balance)

    def body(endpoint: LocalEndpoint):
        own = layouts[endpoint.rank]
        positions = np.concatenate([np.arange(r.start, r.start + r.length) for r in own.ranges])
        v = ones.copy()
        v[broken] = np.nan
        q, k, v = (np.ascontiguousarray(x[positions]) for x in (ones, ones, v))
        arena, sums = Arena(), np.empty((2, 16, 1), np.float32)
        state = State(*sums, np.empty((16, 1, 16), np.float32))
        kernels = CpuKernels(isa=worlds.ISA, threads=1, arena=arena, trace=Trace())
        transport = checks.transport(endpoint)
        ring = RingBlocks(transport, arena, KvBlock(k, v, own), layouts, layouts, spec)

        def fold(kv: KvBlock) -> None:
            fold_in_pieces(kernels, transport, q, own, kv, spec, state)

        attend(kernels, ring, source, fold, state)
        o = np.empty_like(v)
        kernels.finish(state, o, np.empty_like(sums[0]))
        return positions[np.isnan(o.astype(np.float32)).any(axis=(1, 2))]

    reached = LocalWorld(4, seed=1).run(body)
    last = 64 if window is None else min(broken + window, 64)
    assert sorted(np.concatenate(reached)) == list(range(broken, last))


@pytest.mark.parametrize("micro_batches", lanes([2, 3, 4, 9, 67], [0, 3]))
@pytest.mark.parametrize("plan", [Plan(pp=2), Plan(pp=2, cp=2), Plan(tp=2, pp=2, dp=2)], ids=str)
def test_micro_batches(plan, micro_batches):
    plan = msgspec.structs.replace(plan, micro_batches=micro_batches)
    LocalWorld(plan.world, seed=micro_batches).run(
        lambda e: checks.plan_is_exact(e, worlds.DENSE, plan)
    )


def test_more_ranks_than_tokens():
    lengths = (3, 1)
    for plan in (Plan(cp=16), Plan(dp=4), Plan(tp=8, pp=2), Plan(cp=5, balance="contiguous")):
        outputs, _ = worlds.run_local(worlds.DENSE, plan, lengths, seed=3)
        assert worlds.judge(worlds.DENSE, outputs, lengths).passed, str(plan)


def test_delays_change_no_bit():
    plan = Plan(cp=2, tp=2, pp=2, micro_batches=3)
    runs = {worlds.digest(worlds.run_local(worlds.DENSE, plan, seed=s)[0]) for s in range(6)}
    assert len(runs) == 1


def test_same_seed_same_schedule():
    def order(seed):
        seen = []

        def body(endpoint: LocalEndpoint):
            for _ in range(5):
                endpoint.poll()
                seen.append(endpoint.rank)

        LocalWorld(4, seed=seed).run(body)
        return seen

    assert order(5) == order(5)
    assert order(5) != order(6)


def test_deadlock_names_who_waits_for_whom():
    def body(endpoint: LocalEndpoint):
        ring = checks.transport(endpoint)
        ring.wait(ring.start([], [(np.zeros(1), (ring.index + 1) % ring.size)]))

    with pytest.raises(TransportError) as error:
        LocalWorld(3).run(body)
    for rank in range(3):
        assert f"rank {rank} waits on cp to receive from [{(rank + 1) % 3}]" in str(error.value)


def test_a_rank_that_ends_early_is_a_deadlock():
    def body(endpoint: LocalEndpoint):
        if endpoint.rank:
            checks.transport(endpoint).all_gather([np.zeros(1), np.zeros(1)])

    with pytest.raises(TransportError, match="rank 0 has ended; rank 1 waits"):
        LocalWorld(2).run(body)


def test_a_message_of_another_size_is_an_error():
    def body(endpoint: LocalEndpoint):
        pair, other = checks.transport(endpoint), 1 - endpoint.rank
        size = 2 + endpoint.rank
        pair.wait(pair.start([(np.zeros(size), other)], [(np.zeros(2), other)]))

    with pytest.raises(TransportError, match="rank 0 expected 16 bytes from rank 1; got 24"):
        LocalWorld(2).run(body)


def test_an_exception_on_one_rank_reaches_the_caller():
    def body(endpoint: LocalEndpoint):
        if endpoint.rank == 2:
            raise KeyError("lost")
        checks.transport(endpoint).gather_objects(0)

    with pytest.raises(KeyError, match="lost"):
        LocalWorld(4).run(body)
