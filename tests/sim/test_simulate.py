"""`--backend virtual`: tables, records, timelines, and what is slower than it should be."""

import json

import pytest

from pympa.bench.measure.forecast import forecast_cluster
from pympa.bench.options import build_parser, refuse_unused
from pympa.bench.records.file import RecordFile
from pympa.costs.cluster import load_cluster
from pympa.errors import RefusedError
from pympa.sim.slow import parse_slow
from support.experiments import TINY
from support.jobs import run_job
from support.lanes import FULL

COMMAND = ["-m", "pympa.bench", "ring-dense-fp16", "--backend", "virtual"]
PAPER = [*COMMAND, "--cluster", "dgx-h100x2", "--size", "paper"]


def test_the_command(tmp_path):
    output, trace = tmp_path / "o.jsonl", tmp_path / "t.json"
    job = run_job(1, *PAPER, "--output", str(output), "--trace", str(trace))
    assert job.status == 0, job.err
    assert "simulated on 2 x DGX H100" in job.out
    assert job.out.count("simulated") >= 3, "no simulated number without that word beside it"
    records = RecordFile.load(str(output))
    assert [record.role for record in records] == ["baseline", "proposed"]
    device = load_cluster("dgx-h100x2").device
    for record in records:
        assert (record.clock, record.backend) == ("simulated", "virtual")
        assert record.simulation is not None
        joules = device.watts * sum(record.compute_seconds.by_rank)
        tokens = record.batch * record.tokens
        assert record.simulation.joules_per_token == pytest.approx(joules / tokens)
        assert record.process_peak_bytes is None
        assert not record.verified
        assert record.tps * record.step_seconds.median == pytest.approx(tokens)
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event.get("cat") == "step"]
    assert len(steps) == 32, "one of each rank of both plans"
    longest = max(event["dur"] for event in steps[16:])
    assert longest == pytest.approx(1e6 * records[1].step_seconds.median, rel=1e-3)


@FULL
def test_slow_parts_slow_the_table_down(tmp_path):
    seconds = []
    for slow in ([], ["--slow", "rank=3,factor=2", "--slow", "link=7-8,factor=4"]):
        output = tmp_path / f"{len(slow)}.jsonl"
        job = run_job(1, *PAPER, "--plan", "cp=16", *slow, "--output", str(output))
        assert job.status == 0, job.err
        seconds.append(RecordFile.load(str(output))[0].step_seconds.median)
    assert seconds[1] > 1.5 * seconds[0]
    assert "slowed down by --slow: rank=3,factor=2; link=7-8,factor=4" in job.out


def test_requests_that_cannot_be_met_are_refused():
    refused = run_job(1, *COMMAND)
    assert refused.status == 2
    assert "--backend virtual needs --cluster" in refused.err
    refused = run_job(1, *PAPER, "--slow", "rank=16,factor=2")
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert (
        "expected ranks from 0 to 15, and two different ones for a link; got 'rank=16,factor=2'"
        in refused.err
    )
    refused = run_job(1, *PAPER, "--routing-from", "nowhere.jsonl")
    assert refused.status == 2
    assert "--routing-from: expected an experiment with experts; got ring-dense-fp16" in refused.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slow", "rank=1,factor=2"], "--slow works with --backend virtual; got --backend cpu"),
        (["--routing-from", "o.jsonl"], "--routing-from works with --backend virtual; got"),
        (["--backend", "virtual", "--resume"], "--resume works with --backend cpu or cuda; got"),
        (
            ["--backend", "cuda", "--threads", "2"],
            "--threads works with --backend cpu; got --backend cuda",
        ),
        (["--energy"], "--energy works with --backend cuda; got --backend cpu"),
        (
            ["--backend", "virtual", "--router-skew", "0"],
            "--router-skew works with --backend cpu or cuda",
        ),
    ],
)
def test_options_without_effect_are_refused(arguments, says):
    with pytest.raises(RefusedError, match=says):
        refuse_unused(build_parser().parse_args(arguments))
    refuse_unused(build_parser().parse_args(["--iterations", "5"]))
    refuse_unused(build_parser().parse_args(["--backend", "virtual", "--weight-limit", "1GB"]))


def test_what_is_slow():
    assert parse_slow(["rank=3,factor=2.5"], 16) == ({3: 2.5}, {})
    assert parse_slow(["link=8-0, factor=4", "rank=0,factor=1e1"], 16) == ({0: 10.0}, {(0, 8): 4.0})
    for wrong in ("rank=3", "factor=2", "rank=a,factor=2", "rank=3,factor=x", "rank=3,factor=-1",
                  "rank=3,factor=inf", "link=3-3,factor=2", "link=0-16,factor=2",
                  "rank=\N{ARABIC-INDIC DIGIT THREE},factor=2"):  # fmt: skip
        with pytest.raises(ValueError, match=r"--slow: (factor: )?expected"):
            parse_slow([wrong], 16)
    for twice in (["rank=3,factor=2"] * 2, ["link=0-8,factor=2", "link=8-0,factor=3"]):
        with pytest.raises(
            ValueError, match="--slow: expected each rank and each link at most once"
        ):
            parse_slow(twice, 16)


PAPER_SIZE = """
[sizes.paper]
batch = 16
tokens = 4096
[sizes.paper.model]
d_model = 2048
vocabulary = 256
layers = [{ repeat = 4, heads = 16, head_dim = 128, mlp_hidden = 8192 }]
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    head, plans, rest = TINY.partition("[[plans]]")
    path.write_text(head + PAPER_SIZE + plans + rest)
    return path


@FULL
def test_a_measured_table_has_a_simulated_column(tiny, tmp_path):
    output, clusters = tmp_path / "o.jsonl", ("dgx-h100x2", "h100-nvswitch16")
    for cluster in clusters:
        arguments = [str(tiny), "--cluster", cluster, "--output", str(output)]
        job = run_job(2, "-m", "pympa.bench", *arguments)
        assert job.status == 0, job.err
        assert "simulated" in job.out
        assert "simulated, not measured: the paper's size on" in job.out
    found = RecordFile.load(str(output))
    assert all(record.clock == "measured" and record.verified for record in found)
    assert [record.forecast.plan.partition(",micro")[0] for record in found] == [
        "tp=8,pp=2",
        "cp=16",
    ] * 2
    near, far = found[3].forecast.simulated_tps, found[1].forecast.simulated_tps
    assert near > far, "one switch is faster than two nodes"


def test_the_simulated_column_can_be_left_out(tiny, tmp_path):
    output = tmp_path / "o.jsonl"
    arguments = [str(tiny), "--cluster", "none", "--output", str(output)]
    job = run_job(1, "-m", "pympa.bench", *arguments)
    assert job.status == 0, job.err
    assert "simulated" not in job.out
    assert [record.forecast for record in RecordFile.load(str(output))] == [None, None]


def test_a_plan_that_does_not_take_the_cluster_has_no_forecast(tiny, tmp_path):
    output = tmp_path / "o.jsonl"
    job = run_job(2, "-m", "pympa.bench", str(tiny), "--plan", "cp=2", "--output", str(output))
    assert job.status == 0, job.err
    assert RecordFile.load(str(output))[0].forecast is None


@FULL
def test_experts_take_the_loads_of_a_measured_run(tmp_path):
    experiment, output = tmp_path / "moe.toml", tmp_path / "o.jsonl"
    head, plans, rest = TINY.partition("[[plans]]")
    text = head + PAPER_SIZE + plans + rest
    for hidden in ("mlp_hidden = 64", "mlp_hidden = 8192"):
        text = text.replace(hidden, f"{hidden}, experts = 4, top_k = 1")
    experiment.write_text(text)
    run = ["-m", "pympa.bench", str(experiment), "--plan", "dp=2,ep=2", "--output"]
    measured = run_job(2, *run, str(output), "--router-skew", "8", "--cluster", "none")
    assert measured.status == 0, measured.err
    virtual = ["--backend", "virtual", "--cluster", "dgx-h100x2", "--size", "paper"]
    found = []
    for number, more in enumerate(([], ["--routing-from", str(output)])):
        simulated = tmp_path / f"{number}.jsonl"
        job = run_job(1, *run, str(simulated), *virtual, *more)
        assert job.status == 0, job.err
        assert f"the experts' loads are {'measured' if more else 'even'}" in job.out
        found.append(RecordFile.load(str(simulated))[0])
    even, skewed = (record.compute_seconds.by_rank for record in found)
    assert even[0] == pytest.approx(even[1])
    assert skewed[0] > 1.2 * skewed[1], "the busy experts are on rank 0"
    refused = run_job(1, *PAPER[:2], "experts", *virtual, "--routing-from", str(output))
    assert refused.status == 2
    assert "expected a measured record of experts" in refused.err


def test_a_measured_run_waits_for_no_thousand_ranks():
    assert forecast_cluster("none") is None
    assert forecast_cluster(None).ranks == 16
    with pytest.raises(RefusedError, match=r"at most 64 ranks .* got 1,024; .*virtual"):
        forecast_cluster("dgx-h100x128")
