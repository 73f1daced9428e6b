"""`--backend virtual`: tables, records, timelines, and what is slower than it should be."""

import json

import pytest

import conftest
from pympa.bench.record import RecordFile
from pympa.bench.slow import parse_slow
from pympa.cluster import load_cluster

COMMAND = ["-m", "pympa.bench", "ring-dense-fp16", "--backend", "virtual"]
PAPER = [*COMMAND, "--cluster", "dgx-h100x2", "--size", "paper"]


def test_the_command(tmp_path):
    output, trace = tmp_path / "o.jsonl", tmp_path / "t.json"
    job = conftest.run_job(1, *PAPER, "--output", str(output), "--trace", str(trace))
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


def test_slow_parts_slow_the_table_down(tmp_path):
    seconds = []
    for slow in ([], ["--slow", "rank=3,factor=2", "--slow", "link=7-8,factor=4"]):
        output = tmp_path / f"{len(slow)}.jsonl"
        job = conftest.run_job(1, *PAPER, "--plan", "cp=16", *slow, "--output", str(output))
        assert job.status == 0, job.err
        seconds.append(RecordFile.load(str(output))[0].step_seconds.median)
    assert seconds[1] > 1.5 * seconds[0]
    assert "slower than the cluster: rank=3,factor=2; link=7-8,factor=4" in job.out


def test_requests_that_cannot_be_met_are_refused():
    refused = conftest.run_job(1, *COMMAND)
    assert refused.status == 2
    assert "--backend virtual needs --cluster" in refused.err
    refused = conftest.run_job(1, *PAPER, "--slow", "rank=16,factor=2")
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert "expected ranks from 0 to 15, not the same twice; got 'rank=16,factor=2'" in refused.err
    refused = conftest.run_job(1, *COMMAND[:3], "--slow", "rank=1,factor=2")
    assert refused.status == 2
    assert "--slow needs --backend virtual" in refused.err


def test_what_is_slow():
    assert parse_slow(["rank=3,factor=2.5"], 16) == ({3: 2.5}, {})
    assert parse_slow(["link=8-0, factor=4", "rank=0,factor=1e1"], 16) == ({0: 10.0}, {(0, 8): 4.0})
    for wrong in ("rank=3", "factor=2", "rank=a,factor=2", "rank=3,factor=x", "rank=3,factor=-1",
                  "rank=3,factor=inf", "link=3-3,factor=2", "link=0-16,factor=2"):  # fmt: skip
        with pytest.raises(ValueError, match="--slow: expected"):
            parse_slow([wrong], 16)
