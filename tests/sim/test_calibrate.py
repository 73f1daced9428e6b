"""Calibration: which kernels it measures, profiles on the disk, and the command."""

import os

import msgspec
import pytest

from pympa.calibrate.links import _fit as fit_link
from pympa.calibrate.profile import error_table, profile_text
from pympa.costs.cluster import load_cluster
from pympa.costs.device_costs import MeasuredCosts, costs_of
from pympa.kernels.ops import OPS
from pympa.model.model import Model
from pympa.plan.mesh import parse_plan
from pympa.sim.resources import virtual_resources
from pympa.sim.world import VirtualWorld
from pympa.spec import DTYPES, SpecError
from support import worlds
from support.experiments import TINY
from support.jobs import run_job
from support.lanes import FULL
from support.profiles import profile


def test_a_profile_comes_back_from_the_disk(tmp_path):
    path = tmp_path / "here.toml"
    path.write_text(profile_text(profile(shares_memory=True)))
    assert load_cluster(str(path)) == profile(shares_memory=True)
    path.write_text(path.read_text().replace("[[device.curves]]", "[[device.curve]]"))
    with pytest.raises(SpecError, match=r"here.toml: .*did you mean `curves`"):
        load_cluster(str(path))
    with pytest.raises(SpecError, match=r"one of attention.*and curves"):
        msgspec.structs.replace(profile().device, curves=()).__post_init__()
    with pytest.raises(
        ValueError, match=r"formulas: dtype: expected one of bfloat16, float32, .*; got float16"
    ):
        costs_of(profile().device, "float16", 1)


def test_a_link_is_fitted():
    wanted = [(n, 3e-6 + n / 5e9) for n in (1, 1000, 10**6)]
    latency, by_byte = fit_link(*zip(*wanted, strict=True))
    assert latency == pytest.approx(3e-6)
    assert by_byte == pytest.approx(1 / 5e9)


class Asked(MeasuredCosts):
    """Costs that keep the names of the curves that a step asks for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.names = set()

    def by_rows(self, kernel, rows, row_bytes):
        self.names.add(kernel)
        return super().by_rows(kernel, rows, row_bytes)

    def _at(self, kernel, *sizes):
        self.names.add(kernel)
        return super()._at(kernel, *sizes)


def curves_asked_for(spec, plan):
    """Return the names of the curves that one step of a plan asks for on virtual ranks."""
    plan = parse_plan(plan)
    small_cache = msgspec.structs.replace(profile().device, cache_bytes=1)
    costs = Asked(small_cache, "float32", plan.world)

    def body(endpoint):
        rank = virtual_resources(endpoint, plan, costs, isa=worlds.ISA)
        model = Model(spec, rank, DTYPES["float32"])
        model.forward(model.prepare(worlds.batch(worlds.LENGTHS, spec.vocabulary)))

    VirtualWorld(plan.world, profile()).run(body)
    return costs.names


def test_every_kernel_of_a_step_is_measured():
    """Every way of splitting is asked what it costs; and what is measured, some step asks for."""
    steps = [
        *((worlds.DENSE, plan) for plan in ("tp=1", "cp=4", "cp=4,ulysses=2", "cp=2,tp=2", "pp=2,"
          "micro_batches=40", "dim=3", "dim=3,dim_algo=gather", "dim=3,dim_algo=reduce")),
        *((worlds.ODD, plan) for plan in ("tp=1", "tp=4", "pp=2,micro_batches=9")),
        *((worlds.EXPERTS, plan) for plan in ("tp=2,dp=2,ep=2", "dp=3,ep=3", "cp=4,ep=2")),
        *((worlds.ODD_EXPERTS, plan) for plan in ("tp=1", "tp=2,cp=2,ep=2", "tp=2,ep=2,etp=1")),
        (worlds.SANDWICH, "tp=1"), (worlds.POST_AND_PARALLEL, "tp=2"), (worlds.LATENT, "tp=1"),
        (worlds.SINKS, "cp=2"),
    ]  # fmt: skip
    asked = set().union(*(curves_asked_for(*step) for step in steps))
    measured = {workload.curve for op in OPS for workload in op.workloads} | {"between"}
    assert asked - measured == {"count_experts", "drop_overflow"}, "rare, and taken for copies"
    assert measured - asked == {"merge"}, "a ring carries its state; others merge, as known_facts"


def test_errors_in_a_table():
    """Each curve has a row: its points, and how far off those are that are left out."""
    curves = tuple(curve.judged() for curve in profile(dtypes=("float32",)).device.curves)
    lines = [*error_table(curves, None).lines(200)]
    for curve in curves:
        (row,) = [line.split() for line in lines if line.split()[:1] == [curve.kernel]]
        errors = [f"{curve.error:.1%}", f"{curve.worst:.1%}"] if curve.left_out() else ["-", "-"]
        assert row == [curve.kernel, "float32", "1", str(len(curve.seconds)), *errors]


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (1, [], "calibrate needs --output FILE.toml"),
        (1, ["--output", "here.txt"], "--output: expected a file name that ends in .toml"),
        (1, ["--output", "/nowhere/p.toml"], "--output /nowhere/p.toml: No such file or directory"),
        (1, ["--output", "p.toml", "--dtype", "int8"], "argument --dtype: invalid choice"),
    ],
)
def test_refused_requests(ranks, arguments, message):
    job = run_job(ranks, "-m", "pympa.calibrate", *arguments)
    assert job.status == 2
    assert message in job.err
    assert job.err.count("pympa:") == 1


def test_more_ranks_than_cores_are_refused(tmp_path):
    ranks = len(os.sched_getaffinity(0)) + 1
    if ranks > 16:
        pytest.skip("too many cores for a quick test")
    path = tmp_path / "p.toml"
    job = run_job(ranks, "-m", "pympa.calibrate", "--output", str(path))
    assert job.status == 2
    assert f"expected one core for each rank; got {ranks} ranks on {ranks - 1} cores" in job.err


@FULL
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of 2 ranks")
def test_the_command(tmp_path):
    """One dtype on 2 ranks, then a prediction from the profile by the main job's command."""
    path, tiny = tmp_path / "here.toml", tmp_path / "tiny.toml"
    tiny.write_text(TINY)
    job = run_job(
        2, "-m", "pympa.calibrate", "--output", str(path), "--dtype", "float32", timeout=240
    )
    assert job.status == 0, job.err
    assert "fit error" in job.out
    found = load_cluster(str(path))
    assert {c.ranks for c in found.device.curves} == {1, 2}
    assert found.measured is not None
    assert found.links[0].bytes_per_second > 1e8
    bench = "-m", "pympa.bench", str(tiny), "--backend", "virtual", "--cluster", str(path)
    job = run_job(1, *bench, "--plan", "cp=2", "--plan", "tp=2")
    assert job.status == 0, job.err
    assert "simulated on 2 x a core of" in job.out
    refused = run_job(1, *bench, "--dtype", "bfloat16", "--plan", "cp=2")
    assert refused.status == 2
    assert "expected one of float32, which have curves; got bfloat16" in refused.err
