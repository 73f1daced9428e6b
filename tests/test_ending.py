"""One rank of four ends while the others wait: job gone soon, non-zero, records intact."""

import re
import time
from pathlib import Path

import msgspec
import pytest

import conftest
from pympa.bench.record import Record


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("exception", "pympa: rank 2: Traceback"),
        ("value", "pympa: rank 2: ValueError: planned: expected 1; got 2"),
        ("exit", "pympa: rank 2: left early by sys.exit(0)"),
        ("hard-exit", None),
        ("SIGKILL", None),
        ("SIGTERM", None),
    ],
)
def test_one_rank_ends(how, says, tmp_path: Path):
    experiment, output = tmp_path / "tiny.toml", tmp_path / "r.jsonl"
    experiment.write_text(conftest.TINY)
    job = conftest.run_job(
        4, "tests/ending_driver.py", how, str(experiment), "--output", str(output), timeout=90
    )
    ended = time.time()
    broke = float(re.search(r"breaking at ([\d.]+)", job.err)[1])
    assert ended - broke < 10, job.err
    assert job.status != 0
    if says is not None:
        assert job.err.count("pympa: rank") == 1, job.err
        assert says in job.err
    records = [msgspec.json.decode(line, type=Record) for line in output.read_bytes().splitlines()]
    assert [record.role for record in records] == ["baseline"]
    assert records[0].verified


@pytest.mark.usefixtures("nothing_left")
def test_one_rank_fails_on_its_way_into_the_session():
    job = conftest.run_job(4, "tests/ending_driver.py", "", "--backend", "cuda", timeout=60)
    assert job.status != 0
    assert job.err.count("pympa: rank") == job.err.count("Traceback") == 1, job.err
    assert "RuntimeError: planned: no device today" in job.err


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("how", ["late", "SIGSTOP"])
def test_a_rank_that_stays_away_is_not_waited_for(how, tmp_path: Path):
    experiment = tmp_path / "tiny.toml"
    experiment.write_text(conftest.TINY)
    job = conftest.run_job(
        4, "tests/ending_driver.py", how, str(experiment), "--timeout", "2", timeout=60
    )
    assert job.status != 0
    assert re.search(r"rank \d waited 2 s on (world|cp) for messages", job.err)
    assert time.time() - float(re.search(r"breaking at ([\d.]+)", job.err)[1]) < 12
