"""Whether a plan fits a memory with all keys and values, and the most that does."""

import re
import subprocess
import sys

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pympa.footprint.fits import Memory, find_fit, most_within
from pympa.footprint.rehearsal import Rehearsal
from pympa.plan.mesh import parse_plan
from pympa.spec import DynamicScaling, LongRopeScaling, Rope
from support import worlds
from support.jobs import run_job
from support.lanes import lanes
from support.model_files import write_family

BF16 = np.dtype(ml_dtypes.bfloat16)


def fit(spec, plan, lengths, size, ranks=1):
    plan = parse_plan(plan)
    return find_fit(
        Memory("here", size, ranks, 0),
        lambda rank: Rehearsal(spec, plan, rank, BF16, isa=worlds.ISA),
        plan,
        lengths,
    )


@given(st.integers(0, 10**6), st.integers(1, 1000), st.integers(1, 10**8), st.integers(0, 10**5),
       st.sampled_from([1, 64, 4096]))  # fmt: skip
def test_the_most_within_a_limit(fixed, each, limit, step, start):
    def need(number):
        return fixed + each * number + (step if number > 100 else 0)

    found = most_within(limit, need, start)
    assert found == 0 or need(found) <= limit
    assert need(found + max(found // 200, 1)) > limit


@pytest.mark.parametrize("plan", ["tp=1", "cp=4", "tp=2,pp=2", "dp=2,cp=2", "dim=2",
                                  "cp=4,cp_scheme=ulysses"])  # fmt: skip
def test_all_keys_and_values_count(plan):
    """K/V of all layers, over all ranks together, once for each token and kv head."""
    spec, lengths = worlds.DENSE, [300, 200]
    found = fit(spec, plan, lengths, 10**9, parse_plan(plan).world)
    layer = spec.layers[0]
    row = 2 * layer.n_kv_heads * layer.head_dim * BF16.itemsize * len(spec.blocks)
    copies = {"dim=2": 2, "cp=4,cp_scheme=ulysses": 2}.get(plan, 1)  # whole keys; heads in common
    if plan == "tp=2,pp=2":
        row = row * 4 // 3  # of three kv heads both tp ranks need one
    assert sum(lengths) * row <= found.kv_bytes <= copies * sum(lengths) * row
    assert found.fits


def test_windows_keep_what_a_next_token_sees():
    whole = fit(worlds.DENSE, "tp=1", [4000], 10**9).kv_bytes
    windowed = fit(worlds.WINDOWED, "tp=1", [4000], 10**9).kv_bytes
    assert windowed == 9 * 2 * 4 * 8 * 2 * 2
    assert whole > 100 * windowed


@pytest.mark.parametrize("plan", ["tp=1", "cp=2", "pp=2"])
def test_what_is_told_fits_and_a_little_more_does_not(plan):
    spec, size = worlds.DENSE, 20 << 20
    found = fit(spec, plan, [500], size)
    for lengths, wider in (
        ([found.longest], [found.longest * 103 // 100]),
        ([500] * found.most_sequences, [500] * (found.most_sequences * 103 // 100 + 1)),
    ):
        assert fit(spec, plan, lengths, size).fits
        assert not fit(spec, plan, wider, size).fits


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        (worlds.DENSE, "dp=8"),
        (worlds.DENSE, "cp=4"),
        (worlds.DENSE, "dp=3"),
        (worlds.DENSE, "dp=2,cp=2"),
        (worlds.DENSE, "cp=2,dim=2,dim_algo=reduce"),
        (worlds.EXPERTS, "pp=2"),
        (worlds.EXPERTS, "dp=4,ep=4"),
        (worlds.SANDWICH, "pp=2,dp=2"),
        (worlds.LATENT, "cp=2,pp=3"),
    ],
)
def test_what_is_told_fits_every_memory(spec, plan, ranks):
    """Of a batch of one sequence, ranks without any; of stages, other ones with longer texts."""
    size = ranks * (24 << 20)
    found = fit(spec, plan, [400], size, ranks)
    for lengths in ([found.longest], [400] * found.most_sequences):
        again = fit(spec, plan, lengths, size, ranks)
        assert again.needed_bytes <= size
        assert again.needed_bytes > size * 0.9


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("spec", "plan", "lengths"),
    [
        (worlds.DENSE, "dp=8", [4000] * 7),
        (worlds.DENSE, "cp=4", [1001]),
        (worlds.EXPERTS, "dp=3", [400] * 2),
        (worlds.SINKS, "dim=2", [667]),
        (worlds.LATENT, "tp=2", [519] * 3),
        (worlds.WINDOWED, "cp=3,pp=2", [1003]),
    ],
)
def test_what_fits_is_within_the_most_that_does(spec, plan, lengths, shared):
    ranks = parse_plan(plan).world if shared else 1
    size = fit(spec, plan, lengths, 1, ranks).needed_bytes
    for room in (size, size * 101 // 100):
        found = fit(spec, plan, lengths, room, ranks)
        assert found.fits
        assert found.longest >= lengths[0]
        assert found.most_sequences >= len(lengths)
    assert not fit(spec, plan, lengths, size - 1, ranks).fits


def test_nothing_of_loading_stays():
    """Pieces of a wide head are the most that is loaded at once."""
    spec = msgspec.structs.replace(worlds.DENSE, vocabulary=60000)
    rehearsal = Rehearsal(spec, parse_plan("tp=1"), 0, BF16, isa=worlds.ISA)
    weights = rehearsal.arena.used_bytes
    assert rehearsal.arena.touched_bytes == weights
    assert rehearsal.loading_bytes > weights + 2_000_000
    assert fit(spec, "tp=1", [1], 10**9).needed_bytes >= rehearsal.loading_bytes


def test_experts_whose_peak_is_not_where_most_keys_are():
    """Keys and values of all layers stay through each part of a step."""
    spec, plan, lengths = worlds.ODD_EXPERTS, parse_plan("pp=3"), [700, 300]
    found = fit(spec, "pp=3", lengths, 10**9)
    needs = []
    for rank in range(plan.world):
        rehearsal = Rehearsal(spec, plan, rank, BF16, isa=worlds.ISA)
        rehearsal.arena.empty((rehearsal.model.kv_bytes(lengths),), np.uint8)
        rehearsal.step(lengths)
        needs.append(rehearsal.arena.peak_bytes)
    assert max(needs) * 0.9 < found.needed_bytes <= max(needs) + (1 << 20)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_models_whose_positions_depend_on_the_context(kind):
    scaling = (
        DynamicScaling(factor=2.0, trained_context=64)
        if kind == "dynamic"
        else LongRopeScaling(short=(1.0,) * 8, long=(2.0,) * 8, trained_context=64)
    )
    layer = msgspec.structs.replace(worlds.DENSE.layers[0], rope=Rope(scaling=scaling))
    spec = msgspec.structs.replace(worlds.DENSE, layers=(layer,), context=100)
    plain = fit(worlds.DENSE, "tp=2", [100], 30 << 20)
    assert fit(spec, "tp=2", [100], 30 << 20) == plain


def test_weights_that_do_not_fit():
    found = fit(worlds.DENSE, "tp=1", [64], 1000)
    assert not found.fits
    assert found.longest == found.most_sequences == 0


@pytest.mark.parametrize(("plan", "ranks"), lanes([("tp=1", 1), ("tp=2", 2)], [1]))
def test_the_processes_of_a_run(plan, ranks, tmp_path):
    """What footprint says of this host is what processes hold, here mostly libraries."""
    write_family("qwen3", tmp_path / "model")
    command = [sys.executable, "-m", "pympa", "footprint", str(tmp_path / "model"), "--plan", plan]
    printed = subprocess.run(
        [*command, "--tokens", "64"], capture_output=True, text=True, check=True
    ).stdout
    told = float(re.search(r"(?:each|all ranks) +([\d,.]+) ", printed)[1].replace(",", ""))
    program = tmp_path / "load.py"
    program.write_text(
        "import sys\nfrom pympa import Session\n"
        "from pympa.hardware.memory import process_peak_bytes\n"
        f"with Session('{plan}') as s, s.load(sys.argv[1]) as m:\n"
        "    m.logits([list(range(64))])\n"
        "    peaks = s.team.world.gather_objects(process_peak_bytes())\n"
        "    if s.rank == 0:\n        print(sum(peaks) / 1e6)\n"
    )
    job = run_job(ranks, str(program), str(tmp_path / "model"))
    assert job.status == 0, job.err
    assert 0.5 * told < float(job.out) < 2 * told
