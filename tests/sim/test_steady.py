"""Simulating a few passes of a loop gives what simulating all of them gives."""

from collections import Counter

import numpy as np
import pytest

from pympa.bench.experiment.description import Size, load_experiment
from pympa.costs.cluster import load_cluster
from pympa.costs.datasheet import DatasheetCosts
from pympa.kernels import virtual as virtual_kernels
from pympa.model.model import Model
from pympa.plan.mesh import Plan, parse_plan
from pympa.runtime.step import Flight, Span
from pympa.runtime.trace import Trace
from pympa.sim.predict import predict
from pympa.sim.resources import virtual_resources
from pympa.sim.world import Slow, VirtualWorld
from pympa.spec import DTYPES, LayerSpec, ModelSpec
from support import worlds
from support.lanes import FULL

DGX = load_cluster("dgx-h100x2")
COSTS = DatasheetCosts(DGX.device, "bfloat16")
MOE = ModelSpec(
    d_model=64,
    vocabulary=256,
    layers=(LayerSpec(repeat=6, heads=8, head_dim=16, mlp_hidden=72, experts=8, top_k=2),),
)
MIXED = ModelSpec(
    d_model=64,
    vocabulary=256,
    layers=(
        LayerSpec(repeat=5, heads=8, head_dim=16, mlp_hidden=72),
        LayerSpec(repeat=4, heads=4, kv_heads=2, head_dim=16, mlp_hidden=40, gated=True),
    ),
)
WINDOWS = ModelSpec(
    d_model=64,
    vocabulary=256,
    layers=(LayerSpec(repeat=6, heads=8, head_dim=16, mlp_hidden=72, window=70),),
)
CASES = [
    (MIXED, "cp=4"),
    (MIXED, "cp=4,balance=contiguous"),
    (MIXED, "tp=4"),
    (MIXED, "tp=2,dim=2,dim_algo=reduce"),
    (MIXED, "cp=2,dim=2"),
    (MIXED, "tp=2,pp=2"),
    (MIXED, "tp=2,pp=2,micro_batches=8"),
    (MIXED, "tp=2,pp=4,micro_batches=16"),
    (MIXED, "pp=2,micro_batches=64"),
    (MIXED, "cp=4,cp_scheme=ulysses"),
    (WINDOWS, "cp=8"),
    (WINDOWS, "cp=4,dim=2"),
    (WINDOWS, "cp=2,pp=2,micro_batches=64"),
    (MOE, "dp=4,ep=4"),
    (MOE, "tp=4,pp=2,ep=4,micro_batches=8"),
    (MOE, "cp=2,tp=2,ep=2"),
]


@pytest.mark.parametrize(("model", "plan"), CASES, ids=[plan for _, plan in CASES])
def test_few_passes_stand_for_all(model, plan, monkeypatch):
    monkeypatch.setattr(virtual_kernels, "DEVICE_ROWS", 96)
    size, plan = Size(model=model, batch=16, tokens=200), parse_plan(plan)
    few = predict(size.model, size.lengths, plan, "bfloat16", DGX)
    all_of_it = predict(size.model, size.lengths, plan, "bfloat16", DGX, whole=True)
    assert few.transport_calls <= all_of_it.transport_calls
    assert few.layers[0] < few.layers[1] == all_of_it.layers[0]
    for one, other in zip(few.ranks, all_of_it.ranks, strict=True):
        assert one.traffic.sent == other.traffic.sent
        assert one.traffic.received == other.traffic.received
        assert one.traffic.read == other.traffic.read
        assert one.peak_bytes == other.peak_bytes
        assert one.times.step == pytest.approx(other.times.step, rel=1e-6)
        assert one.times.compute == pytest.approx(other.times.compute, rel=1e-6)
        waits = Counter(other.times.waits)
        assert sum(one.times.waits.values()) == pytest.approx(waits.total(), rel=1e-3, abs=1e-9)


def test_slow_ranks_are_simulated_until_the_beat_is_steady():
    size = Size(model=MIXED, batch=8, tokens=4096)
    slow = Slow({1: 3.0}, {})
    few, full = (
        predict(size.model, size.lengths, Plan(cp=4), "bfloat16", DGX, slow, whole=whole)
        for whole in (False, True)
    )
    assert few.step_seconds == pytest.approx(full.step_seconds, rel=1e-6)


def test_a_batch_of_different_lengths_leaves_nothing_out_that_differs():
    model = load_experiment("ring-dense").sizes["local"].model
    size = Size(model=model, batch=6, tokens=(400, 100, 100, 100, 100, 700))
    few, full = (
        predict(
            size.model,
            size.lengths,
            parse_plan("pp=2,micro_batches=6"),
            "bfloat16",
            DGX,
            whole=whole,
        )
        for whole in (False, True)
    )
    assert few.step_seconds == pytest.approx(full.step_seconds, rel=1e-6)
    assert [r.traffic.sent for r in few.ranks] == [r.traffic.sent for r in full.ranks]


def test_a_repeated_pass_is_stretched():
    now = [0.0]
    trace = Trace(lambda: now[0])

    def span(kind, name, start, stop):
        now[0] = start
        with trace.span(kind, name):
            now[0] = stop

    with trace.step():
        span("compute", "before", 0.0, 1.0)
        span("compute", "pass", 1.0, 2.0)
        span("wait", "pass", 2.0, 2.5)
        trace.repeat((1.0, 2.5), (2.5, 5.5), 2)
        span("compute", "after", 5.5, 6.0)
    assert trace.last.spans == [
        Span("compute", "before", 0.0, 1.0),
        Span("compute", "pass", 1.0, 4.0),
        Span("wait", "pass", 4.0, 5.5),
        Span("compute", "after", 5.5, 6.0),
    ]
    times = trace.last.times()
    assert (times.step, times.compute, times.waits) == (6.0, 4.5, {"pass": 1.5})


def test_repeats_inside_repeats():
    now = [0.0]
    trace = Trace(lambda: now[0])
    with trace.step():
        with trace.span("compute", "inner"):
            now[0] = 1.0
        trace.repeat((0.0, 1.0), (1.0, 3.0), 2)
        now[0] = 3.0
        trace.repeat((0.0, 3.0), (3.0, 12.0), 3)
        now[0] = 12.0
    assert trace.last.times().compute == 12.0
    assert trace.last.flights == []
    assert Flight("cp", 0, 1, True, 0.0, 1.0) not in trace.last.flights


@FULL
def test_a_thousand_ranks():
    """Threads take turns, and layouts are shared."""
    cluster = load_cluster("dgx-h100x128")
    model = load_experiment("ring-dense").sizes["paper"].model
    size = Size(model=model, batch=64, tokens=8192)
    found = predict(size.model, size.lengths, parse_plan("dp=64,cp=2,tp=8"), "bfloat16", cluster)
    assert len(found.ranks) == 1024
    assert found.bytes_sent > 0


def test_rows_of_a_virtual_batch_take_no_memory():
    ids = [np.broadcast_to(np.int32(0), (1_000_000,))] * 4

    def body(endpoint):
        rank = virtual_resources(endpoint, Plan(), COSTS, isa=worlds.ISA)
        batch = Model(MIXED, rank, DTYPES["bfloat16"]).prepare(ids).batch
        part, positions = batch.micro_batches[0], batch.positions
        shown = part.ids, part.position_rows, positions
        return [len(array) for array in shown], {array.strides for array in shown}

    rows = [4_000_000, 4_000_000, 1_000_000]
    assert VirtualWorld(1, DGX).run(body) == [(rows, {(0,)})]
