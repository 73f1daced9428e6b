"""Calibration: curves, costs by them, profiles on the disk, and what a prediction must equal."""

import os

import msgspec
import numpy as np
import pytest
from draws import draw
from hypothesis import given
from hypothesis import strategies as st

import checks
import conftest
import worlds
from pympa.backend import build_rank, build_virtual_rank
from pympa.bench.machine import processor_name
from pympa.calibrate.links import _fit as fit_link
from pympa.calibrate.profile import error_table, profile_text
from pympa.calibrate.workloads import WORKLOADS
from pympa.calls import Attended, Multiplied
from pympa.cluster import Cluster, Device, Link, load_cluster
from pympa.costs import MeasuredCosts, costs_of
from pympa.curves import Curve
from pympa.mesh import Plan, parse_plan
from pympa.model import Model
from pympa.spec import DTYPES, SpecError
from pympa.transport.local import LocalWorld
from pympa.virtual import VirtualWorld
from pympa.volume import bytes_sent

SOME_DRAWS, ALL_DRAWS = 60, 500
CALL, BETWEEN, FAR, CACHE_BYTES = 1e-5, 2e-5, 1e-4, 1 << 24


def curve(kernel, seconds, *sizes, dtype="float32", ranks=1):
    grid = np.meshgrid(*map(np.array, sizes), indexing="ij")
    values = np.broadcast_to(seconds(*grid), [len(axis) for axis in sizes])
    return Curve(
        kernel=kernel, dtype=dtype, ranks=ranks, sizes=sizes, seconds=tuple(values.ravel().tolist())
    )


def profile(*, shares_memory=False, ranks=64, dtypes=("float32", "bfloat16")):
    """Return a machine whose kernels take what simple formulas say."""
    curves = [
        made
        for dtype in dtypes
        for made in (
            curve("call.linear", lambda: CALL, dtype=dtype),
            curve("call.attend_block", lambda: CALL, dtype=dtype),
            curve("linear", lambda m, n, k: CALL + 1e-11 * m * n * k, (1, 96), (16, 64), (16, 64),
                  dtype=dtype),
            curve("attend_block", lambda r, k, d: 1e-11 * r * k * d, (1, 96), (16, 512), (16, 64),
                  dtype=dtype),
            curve("mlp", lambda m, n, k: CALL + 2e-11 * m * n * k, (1, 96), (16, 64), (16, 64),
                  dtype=dtype),
            curve("weights", lambda m: FAR + 0 * m, (1, 96), dtype=dtype),
            curve("copy", lambda r, b: CALL + 1e-10 * r * b, (1, 64), (64, 512), dtype=dtype),
            *(curve(f"activation.{name}", lambda r, n: 1e-10 * r * n, (1, 96), (16, 64),
                    dtype=dtype) for name in ("gelu", "gelu_tanh", "silu")),
            curve("between", lambda b: BETWEEN + 0 * b, (1, 1 << 60), dtype=dtype),
        )
    ]  # fmt: skip
    device = Device(
        name="formulas",
        memory_bytes=1 << 30,
        memory_bytes_per_second=1e10,
        flops_per_second=dict.fromkeys(dtypes, 1e11),
        curves=tuple(curves),
        cache_bytes=CACHE_BYTES,
    )
    link = Link(
        name="node", ranks=ranks, latency_seconds=1e-5, bytes_per_second=1e9,
        start_seconds=1e-5, large_start_seconds=5e-5, message_seconds=1e-6,
        shares_memory=shares_memory,
    )  # fmt: skip
    return Cluster(title="formulas", ranks=ranks, device=device, links=(link,))


sizes = st.lists(st.integers(1, 10**6), min_size=2, max_size=5, unique=True).map(sorted)


@given(sizes, sizes, st.floats(0, 1e7), st.floats(0, 1e7))
def test_a_curve_is_exact_where_seconds_are_affine_in_each_size(rows, columns, row, column):
    def seconds(r, c):
        return 1e-6 + 2e-9 * r + 3e-9 * c + 4e-12 * r * c

    found = curve("x", seconds, tuple(rows), tuple(columns)).at(row, column)
    assert found == pytest.approx(seconds(max(row, rows[0]), max(column, columns[0])))


def test_leaving_points_out():
    assert curve("x", lambda n: 1.0 + n, (1, 2, 8, 9)).judged().error == pytest.approx(0)
    kink = Curve(kernel="x", dtype="", ranks=1, sizes=((0, 1, 2, 3),), seconds=(1, 1, 1, 2))
    assert kink.left_out() == pytest.approx([0, 0.5])
    assert kink.judged().worst == 0.5
    both = curve("x", lambda a, b: 1.0 + a * b, (1, 2, 3), (1, 2, 3))
    assert len(both.left_out()) == 6


def test_curves_that_fall_stay_above_nothing():
    falling = Curve(kernel="x", dtype="", ranks=1, sizes=((1, 2),), seconds=(2.0, 1.0))
    assert falling.at(100) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ((2, 1),)}, "sizes: expected ascending numbers"),
        ({"sizes": ((),)}, "sizes: expected ascending numbers"),
        ({"seconds": (1.0,)}, "expected 2 finite numbers of at least 0.* got 1"),
        ({"seconds": (1.0, -1.0)}, "expected 2 finite numbers"),
        ({"seconds": (1.0, float("nan"))}, "expected 2 finite numbers"),
    ],
)
def test_wrong_curves(changes, message):
    good = {"kernel": "x", "dtype": "", "ranks": 1, "sizes": ((1, 2),), "seconds": (1.0, 2.0)}
    with pytest.raises(SpecError, match=message):
        Curve(**(good | changes))


def multiplied(*rows, n=64, k=256, activation="none", gated=False, weight_bytes=0):
    return Multiplied(rows, n, k, activation, gated, 0, weight_bytes)


def test_costs_by_curves():
    costs = MeasuredCosts(profile().device, "float32", 1)
    once = CALL + BETWEEN
    assert costs.linears(multiplied(0)) == pytest.approx(once)
    one = costs.linears(multiplied(100))
    assert one == pytest.approx(once + 1e-11 * 100 * 64 * 256)
    assert costs.linears(multiplied(60, 0, 40)) == pytest.approx(one)
    gated = costs.linears(multiplied(100, activation="silu", gated=True))
    assert gated == pytest.approx(once + 2e-11 * 100 * 64 * 256 + 1e-10 * 100 * 64)
    mlp = costs.mlp(multiplied(100, activation="silu", gated=True), 256)
    assert mlp == pytest.approx(once + 3e-11 * 100 * 64 * 256 + 1e-10 * 100 * 64)
    assert costs.by_rows("copy", 10, 1000) == pytest.approx(once + 1e-10 * 10 * 1000)
    assert costs.by_rows("never measured", 10, 1000) == costs.by_rows("copy", 10, 1000)


def test_weights_that_no_cache_holds():
    """A quarter of 4/3 of the cache comes from memory, half of twice the cache."""
    costs = MeasuredCosts(profile().device, "float32", 1)
    near = costs.linears(multiplied(1, 1, n=1024, k=1024, weight_bytes=CACHE_BYTES))
    assert near == costs.linears(multiplied(1, 1, n=1024, k=1024))
    for times, far in ((4 / 3, 1 / 4), (2, 1 / 2)):
        call = multiplied(1, 1, n=1024, k=1024, weight_bytes=int(times * CACHE_BYTES))
        assert costs.linears(call) - near == pytest.approx(2 * far * FAR, rel=1e-4)


def attended(q, k, **changes):
    call = Attended(
        np.array(q, np.int64).tobytes(), np.array(k, np.int64).tobytes(),
        causal=True, window=None, heads=6, kv_heads=2, head_dim=32, v_head_dim=32, nbytes=0,
    )  # fmt: skip
    return call._replace(**changes)


def test_attention_by_curves():
    costs = MeasuredCosts(profile().device, "float32", 1)
    once, pair = CALL + BETWEEN, 1e-11 * 32

    def work(**changes):
        return (costs.attend(attended([(0, 0, 1000)], [(0, 0, 1000)], **changes)) - once) / pair

    assert work(causal=False) == pytest.approx(6 * 1000 * 1000)
    assert 6 * 500_000 < work() < 6 * 520_000, "pairs that are seen, and some past the diagonal"
    assert work() < 2 * work(window=500) < 2 * work()
    assert costs.attend(attended([(0, 0, 10)], [(0, 10, 10)])) == pytest.approx(once)
    assert costs.attend(attended([(0, 0, 10)], [(1, 0, 10)])) == pytest.approx(once)
    halves = costs.attend(attended([(0, 0, 500), (0, 500, 500)], [(0, 0, 1000)]))
    assert halves == pytest.approx(once + work() * pair, rel=0.03)


def test_curves_of_as_many_ranks_as_compute():
    several = tuple(curve("call.linear", lambda n=n: n * CALL, ranks=n) for n in (1, 4, 8)) + tuple(
        c for c in profile().device.curves if c.kernel == "between"
    )
    device = msgspec.structs.replace(profile().device, curves=several)
    for ranks, taken in ((1, 1), (2, 4), (4, 4), (5, 8), (99, 8)):
        costs = MeasuredCosts(device, "float32", ranks)
        assert costs.linears(multiplied(0)) == pytest.approx(taken * CALL + BETWEEN)


def test_a_profile_comes_back_from_the_disk(tmp_path):
    path = tmp_path / "here.toml"
    path.write_text(profile_text(profile(shares_memory=True)))
    assert load_cluster(str(path)) == profile(shares_memory=True)
    path.write_text(path.read_text().replace("[[device.curves]]", "[[device.curve]]"))
    with pytest.raises(SpecError, match=r"here.toml: .*did you mean `curves`"):
        load_cluster(str(path))
    with pytest.raises(SpecError, match=r"either rates of attention.*or measured curves"):
        msgspec.structs.replace(profile().device, curves=()).__post_init__()
    with pytest.raises(ValueError, match="formulas: measured in bfloat16, float32; got float16"):
        costs_of(profile().device, "float16", 1)


def test_a_link_is_fitted():
    wanted = [(n, 3e-6 + n / 5e9) for n in (1, 1000, 10**6)]
    latency, by_byte = fit_link(*zip(*wanted, strict=True))
    assert latency == pytest.approx(3e-6)
    assert by_byte == pytest.approx(1 / 5e9)


def measured(endpoint, spec, plan, lengths, dtype):
    """Run one real step; return what it sent, its peak and the rows of each expert."""
    rank = build_rank(endpoint, plan, isa=worlds.ISA)
    routing = worlds.record_routing(rank)
    model = Model(spec, rank, DTYPES[dtype])
    model.forward(model.prepare(worlds.batch(lengths, spec.vocabulary)))
    return rank.traffic.sent, rank.arena.peak_bytes, routing


def predicted(endpoint, spec, plan, lengths, dtype, routing):
    costs = costs_of(profile().device, dtype, plan.world)
    rank = build_virtual_rank(endpoint, plan, costs, isa=worlds.ISA, routing=routing[endpoint.rank])
    model = Model(spec, rank, DTYPES[dtype])
    model.forward(model.prepare(worlds.batch(lengths, spec.vocabulary)))
    return rank.traffic.sent, rank.arena.peak_bytes


def check_prediction(spec, plan, lengths, dtype="float32", *, shares_memory=False):
    world = LocalWorld(plan.world, shares_memory=shares_memory)
    real = world.run(lambda e: measured(e, spec, plan, lengths, dtype))
    routing = [of_rank for _, _, of_rank in real]
    virtual = VirtualWorld(plan.world, profile(shares_memory=shares_memory))
    found = virtual.run(lambda e: predicted(e, spec, plan, lengths, dtype, routing))
    assert found == [(sent, peak) for sent, peak, _ in real], str(plan)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("spec", [worlds.DENSE, worlds.EXPERTS, worlds.ODD_EXPERTS],
                         ids=["dense", "experts", "odd experts"])  # fmt: skip
def test_bytes_and_peaks_of_plans(spec, size, all_plans):
    """Bytes sent by each rank to each other and the arena's peak are those of a run, exactly."""
    found = worlds.plans(size, spec)
    for number, plan in enumerate(found if all_plans else worlds.some(found, 12)):
        check_prediction(spec, plan, worlds.LENGTHS, shares_memory=number % 2 == 0)


def test_bytes_and_peaks_of_random_draws(all_plans):
    for number in range(ALL_DRAWS if all_plans else SOME_DRAWS):
        spec, lengths, plan = draw(number)
        check_prediction(spec, plan, lengths, shares_memory=number % 2 == 0)


def test_chunks_of_rows_are_those_of_a_run():
    """More rows than a CPU's kernels take at a time, and than travel to experts together."""
    check_prediction(worlds.EXPERTS, parse_plan("dp=2,ep=2"), (1300, 1500), "bfloat16")
    check_prediction(worlds.DENSE, parse_plan("tp=2"), (1300,), "bfloat16")


def test_keys_are_read_where_they_are():
    """Reading takes no message of keys, however slow the link; what a ring would send counts."""
    plan, lengths = Plan(cp=4), (37, 20)
    routing = [None] * 4

    def run(shares_memory):
        slow = profile(shares_memory=shares_memory)
        link = msgspec.structs.replace(slow.links[0], bytes_per_second=1e3)
        world = VirtualWorld(4, msgspec.structs.replace(slow, links=(link,)))
        ranks = world.run(lambda e: predicted(e, worlds.DENSE, plan, lengths, "float32", routing))
        total = sum(sum(sent.values()) for sent, _ in ranks)
        assert total == sum(bytes_sent(worlds.DENSE, plan, lengths, 4).values())
        return max(world.clocks)

    assert run(True) < 0.6 * run(False)


@pytest.mark.parametrize(("nbytes", "start"), [(1000, 1e-5), (10**6, 5e-5)])
def test_posting_takes_a_rank_its_own_time(nbytes, start):
    def body(endpoint):
        group = checks.transport(endpoint)
        array = np.broadcast_to(np.uint8(0), (nbytes,))
        pending = group.start([(array, 1 - group.index)], [(array, 1 - group.index)])
        posted = endpoint.clock()
        group.wait(pending)
        return posted, endpoint.clock()

    for posted, done in VirtualWorld(2, profile()).run(body):
        assert posted == pytest.approx(start + 2e-6)
        assert done == pytest.approx(posted + 1e-5 + nbytes / 1e9)


def test_every_kernel_of_a_step_is_measured():
    names = {workload.kernel for workload in WORKLOADS}
    used = {"linear", "attend_block", "rope", "finish", "start_state", "mlp", "gather_rows", "copy"}
    assert used | {"add", "sum_partials", "combine_rows", "select_experts", "sort_rows"} <= names
    assert {"norm.rms", "norm.layer", "activation.gelu", "merge"} <= names


def test_errors_in_a_table():
    curves = profile().device.curves
    lines = [*error_table(curves, None).lines(200)]
    assert sum(any(curve.kernel in line for curve in curves) for line in lines) == len(curves)
    assert processor_name()


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (1, [], "calibrate needs --output FILE.toml"),
        (1, ["--output", "here.txt"], "--output: expected a name that ends in .toml"),
        (1, ["--output", "/nowhere/p.toml"], "--output /nowhere/p.toml: No such file or directory"),
        (1, ["--output", "p.toml", "--dtype", "int8"], "argument --dtype: invalid choice"),
    ],
)
def test_refused_requests(ranks, arguments, message):
    job = conftest.run_job(ranks, "-m", "pympa.calibrate", *arguments)
    assert job.status == 2
    assert message in job.err
    assert job.err.count("pympa:") == 1


def test_more_ranks_than_cores_are_refused(tmp_path):
    ranks = len(os.sched_getaffinity(0)) + 1
    if ranks > 16:
        pytest.skip("too many cores for a quick test")
    path = tmp_path / "p.toml"
    job = conftest.run_job(ranks, "-m", "pympa.calibrate", "--output", str(path))
    assert job.status == 2
    assert f"expected a core for each rank; {ranks} ranks share {ranks - 1}" in job.err


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of 2 ranks")
def test_the_command(tmp_path):
    """One dtype on 2 ranks, then a prediction from the profile by the main job's command."""
    path, tiny = tmp_path / "here.toml", tmp_path / "tiny.toml"
    tiny.write_text(conftest.TINY)
    job = conftest.run_job(
        2, "-m", "pympa.calibrate", "--output", str(path), "--dtype", "float32", timeout=240
    )
    assert job.status == 0, job.err
    assert "fit error" in job.out
    found = load_cluster(str(path))
    assert {c.ranks for c in found.device.curves} == {1, 2}
    assert found.measured is not None
    assert found.links[0].bytes_per_second > 1e8
    bench = "-m", "pympa.bench", str(tiny), "--backend", "virtual", "--cluster", str(path)
    job = conftest.run_job(1, *bench, "--plan", "cp=2", "--plan", "tp=2")
    assert job.status == 0, job.err
    assert "simulated on 2 x a core of" in job.out
    refused = conftest.run_job(1, *bench, "--dtype", "bfloat16", "--plan", "cp=2")
    assert refused.status == 2
    assert "measured in float32; got bfloat16" in refused.err
