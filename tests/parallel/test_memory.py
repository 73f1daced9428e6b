"""The arena counts what it gives; a rehearsal on shapes needs what a run needs."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pympa.footprint.rehearsal import Rehearsal, rehearse
from pympa.model.model import Model
from pympa.plan.mesh import Plan
from pympa.runtime.arena import ALIGNMENT_BYTES, BLOCK_BYTES, Arena
from pympa.runtime.ledger import OUTSIDE_LAYERS, USES
from pympa.session.resources import build_resources
from pympa.spec import DTYPES
from pympa.transport.local import LocalWorld
from support import worlds
from support.lanes import lanes


def test_arrays_are_aligned_and_apart():
    arena = Arena()
    arrays = [arena.empty((n, 3), np.float32) for n in (1, 7, 0, 100)]
    for number, array in enumerate(arrays):
        array[...] = number
        assert array.size == 0 or array.ctypes.data % ALIGNMENT_BYTES == 0
    assert [int(a.flat[0]) for a in arrays if a.size] == [0, 1, 3]


def test_scopes_give_back_and_reuse():
    arena = Arena()
    keep = arena.empty((10,), np.uint8)
    for _ in range(3):
        with arena.scope():
            inner = arena.empty((BLOCK_BYTES,), np.uint8)
            with arena.scope():
                arena.empty((BLOCK_BYTES,), np.uint8)[:] = 1
            again = arena.empty((BLOCK_BYTES,), np.uint8)
            again[:] = 2
            inner[:] = 3
            assert (again == 2).all()
        assert arena.used_bytes == 64
    keep[:] = 1
    assert arena.blocks == 3
    assert arena.peak_bytes == 64 + 2 * BLOCK_BYTES
    arena.close()
    assert arena.used_bytes == 0


@given(st.lists(st.integers(0, 3 * BLOCK_BYTES), max_size=8))
def test_dry_counts_as_a_real_one(sizes):
    dry, real = Arena(dry=True), Arena()
    for arena in (dry, real):
        for size in sizes:
            with arena.scope():
                arena.empty((size,), np.uint8)
                arena.empty((size // 2, 2), np.float16)
    assert dry.peak_bytes == real.peak_bytes
    assert dry.mapped_bytes == real.mapped_bytes


@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(cp=4), Plan(tp=4, pp=2, micro_batches=3), Plan(pp=2, micro_batches=50),
     Plan(dp=2, cp=2, balance="contiguous")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "spec",
    [worlds.DENSE, worlds.SLIDING, worlds.SANDWICH,
     msgspec.structs.replace(worlds.LATENT, layers=2 * worlds.LATENT.layers[:1])],
    ids=["dense", "windows", "sandwich", "latents"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16"], [1]))
def test_rehearsal_needs_what_a_run_needs(plan, spec, dtype):
    lengths = (2500, 3, 700)

    def body(endpoint):
        rank = build_resources(endpoint, plan, isa=worlds.ISA)
        model = Model(spec, rank, DTYPES[dtype])
        prepared = model.prepare(worlds.batch(lengths, spec.vocabulary))
        model.forward(prepared)
        blocks = rank.arena.blocks
        model.forward(prepared)
        assert rank.arena.blocks == blocks, "a second step took new memory"
        return rank.arena.peak_bytes, rank.arena.mapped_bytes

    measured = LocalWorld(plan.world).run(body)
    rehearsed = []
    for r in range(plan.world):
        rehearsal = Rehearsal(spec, plan, r, DTYPES[dtype], isa=worlds.ISA)
        rehearsal.step(lengths)
        rehearsed.append((rehearsal.arena.peak_bytes, rehearsal.arena.mapped_bytes))
    assert measured == rehearsed
    assert all(mapped >= peak for peak, mapped in rehearsed)


USED = {
    "dense": (worlds.DENSE, Plan(tp=2, pp=2)),
    "kept": (worlds.DENSE, Plan(pp=2, cp=2, micro_batches=7)),
    "grid": (worlds.DENSE, Plan(tp=2, dim=2)),
    "ulysses": (worlds.DENSE, Plan(cp=4, ulysses=2)),
    "experts": (worlds.ODD_EXPERTS, Plan(dp=2, tp=2, ep=2)),
    "columns": (worlds.EXPERTS, Plan(tp=4, ep=2, etp=2)),
    "rings": (worlds.EXPERTS, Plan(cp=2, ep=2, pp=2)),
    "sandwich": (worlds.SANDWICH, Plan(tp=3, pp=2, micro_batches=7)),
    "post, parallel": (worlds.POST_AND_PARALLEL, Plan(cp=2, dim=2)),
    "latents": (worlds.LATENT, Plan(tp=2, cp=2, ep=2)),
    "sinks": (worlds.SINKS, Plan(cp=4, ulysses=2)),
}


@pytest.mark.parametrize("name", USED)
def test_the_ledger_adds_up(name):
    """Every byte of the high-water mark has one part of the model and one use."""
    spec, plan = USED[name]
    for rank in range(plan.world):
        rehearsal = Rehearsal(spec, plan, rank, DTYPES["bfloat16"], isa=worlds.ISA)
        rehearsal.step((60, 60, 9, 60))
        arena, ledger = rehearsal.arena, rehearsal.ledger
        assert sum(ledger.peak.values()) == arena.peak_bytes
        assert {use for _, use in ledger.peak} <= set(USES)
        layers = {f"layers.{i}" for i in range(len(spec.blocks))}
        assert {part for part, _ in ledger.peak} <= layers | {OUTSIDE_LAYERS}
        for part, uses in ledger.parts.items():
            assert set(uses) == set(USES) - {"loading"}
            if part in layers:
                held = ledger.peak.get((part, "weights"), 0)
                assert held in (0, uses["weights"]), "weights stay once they are loaded"
        kept = sum(size for (_, use), size in ledger.peak.items() if use == "keys/values")
        assert (kept > 0) or plan.micro_batches == 1


def test_loading_leaves_no_gaps_between_weights():
    for arena in (Arena(), Arena(dry=True)):
        weights = []
        for _ in range(3):
            weights.append(arena.empty((9 << 20,), np.uint8, "weights"))
            with arena.scope():
                arena.empty((9 << 20,), np.uint8, "loading")
        assert arena.blocks == 4
        assert arena.touched_bytes == 4 * (9 << 20)
        arena.end_loading()
        assert arena.blocks == 3
        assert arena.touched_bytes == arena.used_bytes == 3 * (9 << 20)


def test_a_real_arena_keeps_no_books():
    arena = Arena()
    with arena.part("layers.0"), arena.scope():
        arena.empty((3,), np.float32, "workspaces")
    assert arena.ledger is None


@pytest.mark.parametrize("plan", [Plan(), Plan(dp=2, ep=2), Plan(tp=4, ep=2, etp=2), Plan(cp=3)])
def test_rehearsal_of_experts_takes_them_to_be_even(plan):
    """Where every row goes to every expert the load is even, as the rehearsal takes it to be."""
    layer = msgspec.structs.replace(worlds.EXPERTS.layers[0], top_k=6)
    spec, lengths = msgspec.structs.replace(worlds.EXPERTS, layers=(layer,)), (1800, 1800)
    kind = DTYPES["bfloat16"]

    def body(endpoint):
        rank = build_resources(endpoint, plan, isa=worlds.ISA)
        model = Model(spec, rank, kind)
        model.forward(model.prepare(worlds.batch(lengths)))
        return rank.arena.peak_bytes

    measured = LocalWorld(plan.world).run(body)
    rehearsed = [rehearse(spec, plan, r, lengths, kind, isa=worlds.ISA) for r in range(plan.world)]
    assert measured == rehearsed
