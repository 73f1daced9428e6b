"""Working sets follow the kernels, the largest chunk that fits is the largest, caches of sysfs."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pympa import _core
from pympa.footprint.rehearsal import Rehearsal
from pympa.footprint.working_set import fitting_chunk, micro_batches_within, most_rows, working_sets
from pympa.hardware.caches import Cache, cache_of_rank, read_caches
from pympa.kernels.core_linear import BLOCK
from pympa.kernels.cpu import CpuKernels
from pympa.plan.layout import split_batch, split_micro_batches
from pympa.plan.mesh import Plan
from pympa.spec import DTYPES, LayerSpec, ModelSpec
from support import worlds
from support.jobs import ROOT

KIND = DTYPES["bfloat16"]
# Wide enough for tiles of 512 outputs, no RoPE table; every size by hand below.
PLAIN = ModelSpec(
    d_model=768,
    vocabulary=256,
    layers=(LayerSpec(repeat=2, heads=2, head_dim=64, mlp_hidden=1536, rope=None),),
)


def measure(spec, plan, rank=0, **options):
    return working_sets(Rehearsal(spec, plan, rank, KIND, isa=worlds.ISA, **options))


def test_the_tile_is_what_the_kernel_reads():
    source = (ROOT / "csrc" / "ops" / "linear_block.hpp").read_text()
    (columns,) = re.findall(r"kColumnBlock = (\d+)", source)
    assert int(columns) == BLOCK


@pytest.mark.parametrize("rows", [1, 33, 96, 700, CpuKernels.row_chunk + 5])
def test_by_hand(rows, monkeypatch):
    """The MLP has the largest tile; the rest follows from the shapes."""
    monkeypatch.setattr("pympa.kernels.cpu.cache_of_rank", lambda threads: 1 << 30)
    found = measure(PLAIN, Plan())(rows)
    assert set(found) == {0, 1}
    assert found[0] == found[1]
    at_once = min(rows, CpuKernels.row_chunk)
    tile = _core.packed_weight_bytes(
        n=512, k=768 + 768, dtype="bfloat16", on=_core.Execution(worlds.ISA)
    )
    works = [
        _core.linear_workspace_bytes(
            m=at_once, n=n, k=k, dtype="bfloat16", gated=False, on=_core.Execution(worlds.ISA)
        )
        for n, k in ((128, 768), (768, 128))
    ]
    works.append(
        _core.mlp_workspace_bytes(
            item_rows=at_once,
            hidden=1536,
            n=768,
            dtype="bfloat16",
            gated=False,
            on=_core.Execution(worlds.ISA),
        )
    )
    works.append(
        _core.attention_workspace_bytes(
            head_dim=64, v_head_dim=64, dtype="bfloat16", on=_core.Execution(worlds.ISA)
        )
    )
    state = padded(4 * rows * 2 * 64) + 2 * padded(4 * rows * 2)
    attention = 3 * padded(2 * rows * 2 * 64) + state  # q, k, v; then normed rows or an output
    last = padded(2 * at_once * 2 * 64) + padded(4 * at_once * 2)
    normed = 3 * padded(2 * rows * 2 * 64) + padded(2 * at_once * 768)
    assert found[0].weight_tile == tile
    assert found[0].activation_chunk == 2 * rows * 768
    assert found[0].operator_buffers == max(map(padded, works))
    assert found[0].intermediate_state == max(attention + last, normed)
    assert found[0].total == sum(dataclasses.astuple(found[0]))


def padded(size):
    return -(-size // 64) * 64


def test_threads_and_columns():
    one = measure(PLAIN, Plan())(64)[0]
    two = measure(PLAIN, Plan(), threads=2)(64)[0]
    assert two.operator_buffers > one.operator_buffers
    assert measure(PLAIN, Plan(tp=2))(64)[0].weight_tile <= one.weight_tile
    second = measure(PLAIN, Plan(pp=2), rank=1)(64)
    assert list(second) == [1], "only this stage"
    assert second[1] == one


@settings(max_examples=25)
@given(
    st.sampled_from([Plan(), Plan(tp=2), Plan(cp=3), Plan(tp=2, dim=2), Plan(dp=2, pp=2)]),
    st.lists(st.integers(1, 3000), min_size=2, max_size=2),
    st.integers(1, 20_000_000),
)
def test_larger_chunks_touch_more_and_larger_caches_hold_more(plan, rows, cache):
    measured = measure(PLAIN, plan)
    totals = [max(w.total for w in measured(count).values()) for count in sorted(rows)]
    assert totals[0] <= totals[1]
    chunk = fitting_chunk(measured, cache, 4000)
    assert 1 <= chunk <= 4000
    fits = [max(w.total for w in measured(c).values()) <= cache for c in (chunk, chunk + 1)]
    assert fits[0] or chunk == 1
    assert not fits[1] or chunk == 4000
    assert fitting_chunk(measured, cache // 2, 4000) <= chunk


@pytest.mark.parametrize("plan", [Plan(), Plan(ep=2, dp=2), Plan(tp=2)], ids=str)
def test_with_experts(plan):
    measured = measure(worlds.ODD_EXPERTS, plan)
    for cache in (1, 100_000, 400_000):
        chunk = fitting_chunk(measured, cache, 2000)
        assert chunk == 1 or max(w.total for w in measured(chunk).values()) <= cache


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 100),
)
def test_fewest_micro_batches(lengths, dp, cp, chunk):
    """No micro-batch is larger than the chunk, and fewer would have a larger one."""
    plan = Plan(dp=dp, cp=cp)
    count = micro_batches_within(plan, worlds.DENSE, lengths, chunk)
    assert most_rows(plan, lengths, count) <= chunk
    if cp == 1:
        parts = [split_micro_batches(group, count) for group in split_batch(lengths, dp)]
        assert max(p.rows for group in parts for p in group) == most_rows(plan, lengths, count)
    if count > 1:
        assert most_rows(plan, lengths, count - 1) > chunk


def test_whole_sequences_where_a_model_is_not_causal():
    assert micro_batches_within(Plan(dp=2), worlds.NOT_CAUSAL, [50] * 8, 60) == 4
    assert micro_batches_within(Plan(dp=2), worlds.NOT_CAUSAL, [50] * 8, 10) == 4
    assert micro_batches_within(Plan(dp=2), worlds.DENSE, [50] * 8, 10) == 20


def fake_sysfs(folder: Path, **caches: tuple[str, str, str, str]) -> Path:
    for name, values in caches.items():
        (folder / name).mkdir()
        for file, text in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (folder / name / file).write_text(text + "\n")
    return folder


def test_caches_of_a_rank(tmp_path):
    folder = fake_sysfs(
        tmp_path,
        index0=("1", "Data", "32K", "0"),
        index1=("1", "Instruction", "32K", "0"),
        index2=("2", "Unified", "1M", "0-1"),
        index3=("3", "Unified", "32768K", "0-7,64"),
    )
    (folder / "index4").mkdir()
    found = read_caches(folder)
    assert found[2] == Cache(2, "unified", 1 << 20, 2)
    assert [str(cache) for cache in found[1:3]] == [
        "L1 instruction 32 KiB", "L2 unified 1,024 KiB shared by 2 cpus"
    ]  # fmt: skip
    assert cache_of_rank(1, folder) == (1 << 20) // 2 + (32 << 20) // 9
    assert cache_of_rank(2, folder) == (1 << 20) + (64 << 20) // 9
    assert cache_of_rank(1, folder / "index4") is None
