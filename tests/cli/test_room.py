"""What fits is known before anything is made: of nodes and control groups, with the check."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from pympa.bench.experiment.description import Size
from pympa.bench.measure.room import checks_of, lacking
from pympa.bench.measure.truth import Job
from pympa.bench.records.record import Record
from pympa.hardware.memory import memory_limits
from pympa.model.random_weights import random_weights
from pympa.plan.mesh import Plan, parse_plan
from pympa.plan.partition import stage_bounds
from pympa.session import room
from pympa.spec import DTYPES, ModelSpec, SpecError
from support import worlds
from support.experiments import TINY
from support.jobs import altered_job, run_job
from support.lanes import FULL

GIB = 1 << 30


def job_of(spec: ModelSpec, batch: int, tokens: int) -> Job:
    size = Size(model=spec, batch=batch, tokens=tokens)
    return Job("x", "local", size, DTYPES["float32"], (), random_weights(size.model))


def fitting(limits: list[dict[str, int]], job: Job, plan: Plan, check: str, monkeypatch):
    """Return what each rank of a plan is told, with the limits that each rank sees."""
    everyone: list[list[object]] = []
    told = []
    stages = stage_bounds(job.size.model, plan, itemsize=4)
    for turn in range(2):  # first to learn what all ranks say, then to hear it
        for rank, seen in enumerate(limits):
            said: list[object] = []

            def gather(value, root=None, said=said, turn=turn):
                said.append(value)
                number = len(said) - 1
                return [of_rank[number] for of_rank in everyone] if turn else [value]

            team = SimpleNamespace(
                accelerator=None, world=SimpleNamespace(gather_objects=gather), rank=rank,
                isa=worlds.ISA, threads=1, reaches=None, size=len(limits),
            )  # fmt: skip
            monkeypatch.setattr(room, "memory_limits", lambda seen=seen: dict(seen))
            short = lacking(team, room.Room(team), job, plan, stages, check)
            if turn:
                told.append(short)
            else:
                everyone.append(said)
    return told


def test_all_ranks_of_a_node_count_together(monkeypatch):
    job, plan = job_of(worlds.DENSE, 2, 4000), parse_plan("cp=2")
    one = fitting([{"node a": GIB}, {"node b": GIB}], job, plan, "none", monkeypatch)
    assert one == [None, None]
    few = [{"node a": 300 << 20}, {"node a": 300 << 20}]
    for text in fitting(few, job, plan, "none", monkeypatch):
        assert text is not None
        assert "plan cp=2 at size local does not fit: node a needs" in text
        assert "314,572,800 are available" in text


def test_a_control_group_counts_its_own_ranks(monkeypatch):
    job, plan = job_of(worlds.DENSE, 2, 4000), parse_plan("cp=2")
    both = {"node a": GIB, "control group j of node a": GIB}
    small = {"node a": GIB, "control group k of node a": 100 << 20}
    assert fitting([both, both], job, plan, "none", monkeypatch) == [None, None]
    told = fitting([both, small], job, plan, "none", monkeypatch)
    assert all("control group k of node a needs" in text for text in told)


def test_the_oracle_and_the_run_on_one_rank_count_where_rank_0_is(monkeypatch):
    job, plan = job_of(worlds.DENSE, 1, 20_000), parse_plan("cp=2")
    tight = [{"node a": 400 << 20}, {"node b": 400 << 20}]
    assert fitting(tight, job, plan, "none", monkeypatch) == [None, None]
    for text in fitting(tight, job, plan, "whole", monkeypatch):
        assert "node a needs" in text
        assert "of them for verification, see --no-verify" in text


def test_what_verification_a_job_gets():
    assert checks_of(job_of(worlds.DENSE, 1, 100), verifies=True) == ("whole", "sampled")
    assert checks_of(job_of(worlds.DENSE, 1, 10**6), verifies=True) == ("sampled",)
    assert checks_of(job_of(worlds.WINDOWED, 1, 10**6), verifies=True) == ("whole", "sampled")
    assert checks_of(job_of(worlds.DENSE, 1, 100), verifies=False) == ("none",)


def test_too_many_sequences_are_a_slip():
    with pytest.raises(SpecError, match="batch: expected at most 16,777,216 sequences; got 1,073"):
        Size(model=worlds.DENSE, batch=1 << 30, tokens=1)


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in {"proc/meminfo": "MemAvailable: 1000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def left(root: Path) -> list[int]:
    return [*memory_limits(root).values()]


def test_control_groups_of_both_versions(tmp_path):
    assert left(write(tmp_path / "none", {})) == [1_024_000]
    nested = {
        "proc/self/cgroup": "0::/job/step",
        "sys/fs/cgroup/job/step/memory.max": "max",
        "sys/fs/cgroup/job/step/memory.current": 5,
        "sys/fs/cgroup/job/step/memory.stat": "inactive_file 3",
        "sys/fs/cgroup/job/memory.max": 900,
        "sys/fs/cgroup/job/memory.current": 500,
        "sys/fs/cgroup/job/memory.stat": "anon 300\ninactive_file 150",
    }
    found = memory_limits(write(tmp_path / "nested", nested))
    assert [*found.values()] == [1_024_000, 550], "cached files count as free"
    assert "control group sys/fs/cgroup/job of node" in [*found][1]
    seen_from_inside = {
        "proc/self/cgroup": "0::/somewhere/else",
        "sys/fs/cgroup/memory.max": 700,
        "sys/fs/cgroup/memory.current": 600,
        "sys/fs/cgroup/memory.stat": "anon 600",
    }
    assert left(write(tmp_path / "inside", seen_from_inside)) == [1_024_000, 100]
    older = {
        "proc/self/cgroup": "9:cpu:/\n4:memory:/a\n0::/",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 2000,
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 2500,
        "sys/fs/cgroup/memory/a/memory.stat": "total_inactive_file 100",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 1,
        "sys/fs/cgroup/memory/memory.stat": "cache 1",
    }
    assert left(write(tmp_path / "older", older)) == [1_024_000, 0]


def large(tokens: int) -> str:
    return TINY.replace("batch = 2", "batch = 4").replace("tokens = 32", f"tokens = {tokens}")


def bench(folder: Path, ranks: int, text: str, *options: str, available: int | None = None):
    path = folder / "large.toml"
    path.write_text(text)
    start = altered_job(f"available={available}") if available else ("-m", "pympa.bench")
    return run_job(ranks, *start, str(path), *options, timeout=90)


def test_a_thousand_million_tokens_are_refused_at_once(tmp_path):
    job = bench(tmp_path, 2, large(10**9), "--plan", "tp=2", available=24 * GIB)
    assert job.status == 1
    assert "size local does not fit: node here needs 64,000,016,000 bytes for the input" in job.err
    assert job.seconds < 20


@FULL
def test_no_node_has_memory_for_a_tebitoken(tmp_path):
    job = bench(tmp_path, 2, large(1 << 38), "--plan", "tp=2")
    assert job.status == 1
    assert "bytes for the input of its 2 ranks" in job.err
    assert job.seconds < 20


def test_ranks_that_fit_alone_and_not_together_are_refused(tmp_path):
    text = large(200_000)
    refused = bench(tmp_path, 2, text, "--plan", "tp=2", available=GIB)
    assert refused.status == 1
    assert "plan tp=2 at size local does not fit: node here needs" in refused.err
    assert "computing the float64 oracle" not in refused.err


@FULL
def test_where_the_oracle_does_not_fit_rows_are_sampled(tmp_path):
    output = tmp_path / "r.jsonl"
    windowed = large(20_000).replace("heads = 4", "heads = 4, window = 16")
    plan = ("--plan", "cp=2,balance=contiguous", "--output", str(output), "--cluster", "none")
    job = bench(tmp_path, 2, windowed, *plan, available=700_000_000)
    assert job.status == 0, job.err
    (record,) = [msgspec.json.decode(line, type=Record) for line in output.open("rb")]
    assert record.verified
    assert record.sampled_rows is not None
    assert "sampled rows are checked" in job.out


@FULL
def test_a_step_of_nine_days_needs_a_word(tmp_path):
    """The plan is refused before the oracle runs, and others are measured."""
    path, output = tmp_path / "tiny.toml", tmp_path / "r.jsonl"
    path.write_text(TINY)
    command = (
        *altered_job("long_steps=tp=2"),
        str(path),
        "--cluster",
        "none",
        "--output",
        str(output),
    )
    only = run_job(2, *command, "--plan", "tp=2", timeout=60)
    assert only.status == 1
    assert "plan tp=2 at size local: a step takes at least 811,505 s here, and 4 steps" in only.err
    assert "3,246,020 s; start it with --allow-long" in only.err
    assert "oracle" not in only.err
    both = run_job(2, *command, "--plan", "tp=2", "--plan", "cp=2", timeout=60)
    assert both.status == 1
    assert both.err.count("--allow-long") == 1
    allowed = run_job(2, *command, "--plan", "tp=2", "--allow-long", timeout=60)
    assert allowed.status == 0, allowed.err
    found = [msgspec.json.decode(line, type=Record).plan for line in output.open("rb")]
    assert found == ["cp=2", "tp=2"]


def test_the_simulator_has_no_use_for_the_word():
    job = run_job(
        1, "-m", "pympa.bench", "ring-dense", "--backend", "virtual", "--cluster", "dgx-h100x2",
        "--allow-long", timeout=60,
    )  # fmt: skip
    assert job.status == 2
    assert "--allow-long works with --backend cpu or cuda" in job.err
