"""The timeline that --trace writes: its format, its clocks, its file."""

import itertools
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pympa.bench.measure.clocks import Offset, clock_offsets
from pympa.bench.records.file import RecordFile
from pympa.bench.report.timeline import plan_events
from pympa.runtime.step import Flight, Span, Step
from pympa.transport.local import LocalWorld
from support import checks
from support.experiments import TINY
from support.jobs import Finished, driver, run_job
from support.lanes import FULL, lanes

THREADS = ["step", "compute", "wait"]


class Process:
    """What a viewer shows of one process: its threads' slices and its messages, in nanoseconds."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        named = {e["name"]: e["args"] for e in events if e["ph"] == "M" and "tid" not in e}
        self.name = named["process_name"]["name"]
        self.order = named["process_sort_index"]["sort_index"]
        of_threads = [e for e in events if e["ph"] == "M" and "tid" in e]
        names = {e["tid"]: e["args"]["name"] for e in of_threads if e["name"] == "thread_name"}
        assert list(names.values()) == THREADS
        self.threads: dict[str, list[dict[str, Any]]] = {name: [] for name in THREADS}
        self.messages: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for event in events:
            if event["ph"] == "X":
                self.threads[names[event["tid"]]].append(event)
            elif event["ph"] in "be":
                self.messages[event["id2"]["local"]].append(event)
            else:
                assert event["ph"] == "M"

    def check(self) -> None:
        """Slices of a thread follow one another inside the step; so do a message's two ends."""
        (step,) = self.threads["step"]
        begin, end = _ns(step["ts"]), _ns(step["ts"]) + _ns(step["dur"])
        for name in ("compute", "wait"):
            edges = [begin]
            for event in self.threads[name]:
                assert event["dur"] >= 0
                edges += [_ns(event["ts"]), _ns(event["ts"]) + _ns(event["dur"])]
            assert [*edges, end] == sorted([*edges, end])
        for first, last in self.messages.values():
            assert (first["ph"], last["ph"]) == ("b", "e")
            assert all(first[key] == last[key] for key in ("cat", "name", "pid"))
            assert begin <= _ns(first["ts"]) <= _ns(last["ts"]) <= end
            assert first["args"].keys() == {"axis", "peer", "bytes"}


def _ns(microseconds: float) -> int:
    assert abs(1e3 * microseconds - round(1e3 * microseconds)) < 1e-3
    return round(1e3 * microseconds)


def load(path: Path) -> list[Process]:
    """Read a timeline and check all of it."""
    return processes(json.loads(path.read_text())["traceEvents"])


def processes(events: list[dict[str, Any]]) -> list[Process]:
    by_process: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_process[event["pid"]].append(event)
    found = [Process(of_one) for of_one in by_process.values()]
    for process in found:
        process.check()
    assert all(a.order < b.order for a, b in itertools.pairwise(found))
    threads = [{e["tid"] for e in of_one if "tid" in e} for of_one in by_process.values()]
    assert len(set().union(*threads)) == len(THREADS) * len(found)
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def bench(ranks: int, *arguments: object) -> Finished:
    return run_job(ranks, "-m", "pympa.bench", *map(str, arguments), timeout=90)


def test_events_of_a_plan():
    """Two ranks whose clocks differ by 50 s; the second starts 1 ms later."""
    spans = [Span("compute", "linear", 7.0, 7.001), Span("wait", "cp", 7.001, 7.003)]
    flights = [Flight("cp", 1, 64, True, 7.0005, 7.003), Flight("cp", 1, 32, False, 7.0005, 7.0005)]
    later = [s._replace(start=s.start + 50.001, stop=s.stop + 50.001) for s in spans]
    steps = [Step(7.0, 7.004, spans, flights), Step(57.001, 57.0045, later, [])]
    events = plan_events("ring cp=2", steps, [Offset(0.0, 0.0), Offset(-50.0, 3e-6)], 5)
    first, second = processes(list(events))
    assert (first.name, first.order) == ("ring cp=2, rank 0", 5)
    assert (second.name, second.order) == ("ring cp=2, rank 1", 6)
    (step,), (linear,), (wait,) = first.threads.values()
    assert (step["ts"], step["dur"]) == (0, 4000)
    assert step["args"] == {
        "compute (ms)": 1, "exposed wait (ms)": 2, "other (ms)": 1, "hidden (ms)": 0.5,
        "error of this clock (ms)": 0,
    }  # fmt: skip
    assert (linear["name"], linear["ts"], linear["dur"]) == ("linear", 0, 1000)
    assert (wait["name"], wait["ts"], wait["dur"]) == ("cp", 1000, 2000)
    (received, _), (sent, _) = first.messages.values()
    assert received["name"] == "cp receive"
    assert received["args"] == {"axis": "cp", "peer": 1, "bytes": 64}
    assert (sent["name"], sent["args"]["bytes"]) == ("cp send", 32)
    assert second.threads["step"][0]["ts"] == 1000
    assert second.threads["step"][0]["args"]["error of this clock (ms)"] == 0.003


def test_clocks_that_differ():
    world = LocalWorld(5, seed=3)

    def body(endpoint):
        skew = 1000.0 * endpoint.rank
        return clock_offsets(checks.transport(endpoint, "world"), lambda: world.steps + skew)

    found, *others = world.run(body)
    assert others == [[]] * 4
    assert found[0] == Offset(0, 0)
    for rank, offset in enumerate(found):
        assert abs(offset.seconds + 1000 * rank) <= offset.error_seconds < 50


def test_a_job(tiny, tmp_path):
    path, output = tmp_path / "t.json", tmp_path / "r.jsonl"
    path.write_text("what was there before")
    job = bench(2, tiny, "--trace", path, "--output", output, "--no-shared-memory")
    assert job.status == 0, job.err
    records = RecordFile.load(str(output))
    found = load(path)
    assert [p.name for p in found] == [
        f"tiny {r.plan} {r.role}, rank {rank}" for r in records for rank in range(2)
    ]
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "t.json", "tiny.toml"]
    for index, process in enumerate(found):
        record, rank = records[index // 2], index % 2
        sent = [m[0]["args"] for m in process.messages.values() if m[0]["name"].endswith("send")]
        assert sum(message["bytes"] for message in sent) == record.bytes_sent.by_rank[rank]
        assert {message["peer"] for message in sent} <= {1 - rank}
        assert any(e["name"] == "attend_block" for e in process.threads["compute"])
    assert {e["name"] for e in found[2].threads["wait"]} == {"cp"}
    for r in records:
        (axis,) = r.overlap
        overlap = r.overlap[axis]
        assert overlap.in_flight == pytest.approx(overlap.hidden + overlap.exposed)
        assert overlap.exposed <= r.comm_seconds.max
        assert overlap.hidden <= r.hidden_seconds.max
        if not r.oversubscribed:
            assert f"overlap: {axis}" in job.out


@FULL
def test_plans_measured_before_are_not_in_it(tiny, tmp_path):
    path, output = tmp_path / "t.json", tmp_path / "r.jsonl"
    first = bench(2, tiny, "--output", output, "--plan", "tp=2")
    assert first.status == 0, first.err
    plans = ["--plan", "tp=2", "--plan", "dp=2"]
    job = bench(2, tiny, "--output", output, "--trace", path, "--resume", *plans)
    assert job.status == 0, job.err
    assert [p.name for p in load(path)] == [f"tiny dp=2 given, rank {rank}" for rank in range(2)]


@FULL
def test_a_job_that_breaks_leaves_a_whole_file(tiny, tmp_path):
    path = tmp_path / "t.json"
    job = run_job(
        4, driver("ending_driver"), f"SIGKILL@{tmp_path / 'moment'}", str(tiny), "--trace",
        str(path), timeout=60,
    )  # fmt: skip
    assert job.status != 0
    assert len(load(path)) == 4


@pytest.mark.parametrize(
    ("given", "says"),
    lanes(
        [
            ("nowhere/t.json", "t.json: No such file or directory"),
            (".", "expected a new file or a regular one to replace; got a directory"),
            ("r.jsonl", "r.jsonl: expected another file than --output"),
        ],
        [1],
    ),
)
def test_files_that_cannot_be(tiny, tmp_path, given, says):
    job = bench(4, tiny, "--trace", tmp_path / given, "--output", tmp_path / "r.jsonl")
    assert job.status == 2
    assert f"pympa: --trace {tmp_path}" in job.err
    assert says in job.err
    assert job.err.count("pympa: ") == 1
    assert "oracle" not in job.err
