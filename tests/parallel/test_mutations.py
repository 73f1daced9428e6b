"""Verification must notice: each test breaks a run in one place and expects it to fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pympa.kernels.cpu import CpuKernels
from pympa.model.resources import RankResources
from pympa.parallel.halo import Part, seen_part
from pympa.plan.layout import Layout
from pympa.plan.mesh import Plan
from pympa.spec import ModelSpec
from support import worlds
from support.lanes import lanes
from support.tampering import double, drop, drop_row, on_receive, swap_rows

RING, TENSOR, STAGES = Plan(cp=4), Plan(tp=4), Plan(pp=2, micro_batches=2)
GATHERED, ULYSSES = Plan(cp=4, cp_scheme="allgather"), Plan(cp=4, cp_scheme="ulysses")
TWO_LEVELS, GRID = Plan(cp=4, ulysses=2), Plan(tp=2, dim=2)
GRIDS = [Plan(dim=3, dim_algo=algorithm) for algorithm in ("exchange", "gather", "reduce")]
KEPT = Plan(pp=2, micro_batches=9)  # token chunks, so K/V are kept
HALOS = {  # and the message to alter: one with keys that some queries see and others do not
    Plan(cp=4): 1,
    Plan(cp=3, micro_batches=9): 9,
    Plan(cp=2, dim=2, dim_algo="reduce"): 1,
}


def fails(
    plan: Plan,
    alter: Callable[[RankResources], None],
    dtype: str,
    spec: ModelSpec = worlds.DENSE,
    *,
    shares_memory: bool = False,
) -> bool:
    outputs, _ = worlds.run_local(spec, plan, dtype=dtype, alter=alter, shares_memory=shares_memory)
    return not worlds.judge(spec, outputs, worlds.LENGTHS, dtype).passed


@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16"], [1]))
@pytest.mark.parametrize("tamper", [drop, double, swap_rows])
@pytest.mark.parametrize(
    ("plan", "axis"),
    [(RING, "ring"), (TENSOR, "tp"), (STAGES, "pp"), (KEPT, "pp"), (Plan(cp=2, tp=2), "ring"),
     (GATHERED, "ring"), (ULYSSES, "ulysses"), (TWO_LEVELS, "ring"), (TWO_LEVELS, "ulysses"),
     (GRID, "dim"), (GRID, "tp"), *((grid, "dim") for grid in GRIDS)],
    ids=str,
)  # fmt: skip
def test_messages(plan, axis, tamper, dtype):
    last = plan.world - 1

    def alter(rank: RankResources) -> None:
        if rank.mesh.rank == last:
            on_receive(rank, axis, 1, tamper)

    assert fails(plan, alter, dtype)


@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16"], [1]))
@pytest.mark.parametrize("tamper", [drop, double, swap_rows, drop_row])
@pytest.mark.parametrize("plan", HALOS, ids=str)
def test_messages_of_a_halo(plan, tamper, dtype):
    def alter(rank: RankResources) -> None:
        if rank.mesh.rank == plan.world - 1:
            on_receive(rank, "ring", HALOS[plan], tamper)

    assert fails(plan, alter, dtype, worlds.WINDOWED)


@pytest.mark.parametrize("shares_memory", [False, True], ids=["sent", "shared"])
@pytest.mark.parametrize("broken", [1, -1, "narrow"])
@pytest.mark.parametrize("plan", HALOS, ids=str)
def test_wrong_rows_of_a_halo(plan, broken, shares_memory, monkeypatch):
    """Rows before or after those that are seen, or one position less of the window."""

    def wrong(q: Layout, k: Layout, causal: bool, window: int) -> Part:
        if broken == "narrow":
            return seen_part(q, k, causal, window - 1)
        part = seen_part(q, k, causal, window)
        bounds = tuple((a + broken, b + broken) for a, b in part.bounds)
        fits = bounds and bounds[0][0] >= 0 and bounds[-1][1] <= k.rows
        return Part(part.layout, part.first_rows + broken, bounds) if fits else part

    monkeypatch.setattr("pympa.parallel.ring.seen_part", wrong)
    assert fails(plan, lambda rank: None, "bfloat16", worlds.WINDOWED, shares_memory=shares_memory)


@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16"], [1]))
@pytest.mark.parametrize(
    ("plan", "times"),
    [
        *((p, times) for p in (RING, GATHERED, TWO_LEVELS) for times in (0, 2)),
        *((p, 0) for p in (Plan(), TENSOR, STAGES, KEPT, Plan(dp=2), ULYSSES, *GRIDS[:2])),
    ],
    ids=str,
)
def test_key_blocks(plan, times, dtype):
    """One block of keys attended to not at all; in a ring, where it is a part of them, twice."""

    def alter(rank: RankResources) -> None:
        kernels = rank.kernels
        assert isinstance(kernels, CpuKernels)
        attend, calls = kernels.attend_block, []

        def tampered(q, q_layout, kv, state, spec):
            calls.append(None)
            for _ in range(times if len(calls) == 1 else 1):
                attend(q, q_layout, kv, state, spec)

        if rank.mesh.rank == 0:
            kernels.attend_block = tampered

    assert fails(plan, alter, dtype)


def test_nan_never_passes():
    def alter(rank: RankResources) -> None:
        if rank.mesh.rank == 1:
            on_receive(rank, "ring", 0, lambda arrays, _: arrays[0].fill(np.nan))

    assert fails(RING, alter, "float32")


@pytest.mark.parametrize("kind", ["score_tile", "fold_tile"])
def test_score_tiles(kind):
    """A tile of scores left out on one rank."""

    def alter(rank: RankResources) -> None:
        kernel, calls = getattr(rank.kernels, kind), []

        def tampered(*arguments):
            calls.append(None)
            if len(calls) > 1 or rank.mesh.rank:
                kernel(*arguments)
            elif kind == "score_tile":
                arguments[-1].fill(0)

        setattr(rank.kernels, kind, tampered)

    assert fails(GRIDS[2], alter, "float32")


def test_slices_that_attend_alone_are_another_model():
    plan = Plan(dim=2, dim_algo="independent")
    assert not plan.exact
    assert fails(plan, lambda rank: None, "float32")


def test_untouched_runs_pass():
    for plan in (RING, TENSOR, STAGES, KEPT, GATHERED, ULYSSES, TWO_LEVELS, GRID, *GRIDS):
        assert not fails(plan, lambda rank: None, "bfloat16")
    for plan in HALOS:
        assert not fails(plan, lambda rank: None, "bfloat16", worlds.WINDOWED)
