"""One rank of four ends while the others wait: job gone soon, non-zero, records intact."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest

from pympa.bench.records.record import Record
from support.experiments import TINY
from support.jobs import MPIRUN, ROOT, altered_job, driver, run_job, wait_until
from support.lanes import FULL, lanes

SOON_SECONDS = 15  # a busy machine included; a deadline that is not kept is 300 s


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("how", "says"),
    lanes(
        [
            ("exception", "pympa: rank 2: Traceback"),
            ("value", "pympa: rank 2: ValueError: planned: expected 1; got 2"),
            ("exit", "pympa: rank 2: called sys.exit(0)"),
            ("hard-exit", None),
            ("SIGKILL", None),
            ("SIGTERM", None),
        ],
        [0, 4],
    ),
)
def test_one_rank_ends(how, says, tmp_path: Path):
    experiment, output = tmp_path / "tiny.toml", tmp_path / "r.jsonl"
    experiment.write_text(TINY)
    moment = tmp_path / "moment"
    job = run_job(
        4, driver("ending_driver"), f"{how}@{moment}", str(experiment), "--output", str(output),
        timeout=120,
    )  # fmt: skip
    assert time.time() - float(moment.read_text()) < SOON_SECONDS, job.err
    assert job.status != 0
    if says is not None:
        assert job.err.count("pympa: rank") == 1, job.err
        assert says in job.err
    records = [msgspec.json.decode(line, type=Record) for line in output.read_bytes().splitlines()]
    assert [record.role for record in records] == ["baseline"]
    assert records[0].verified


@FULL
@pytest.mark.usefixtures("nothing_left")
def test_a_rank_that_is_killed_while_others_wait_for_the_oracle(tmp_path: Path):
    """The launcher tells of it; no rank takes the end of another for an error of its own."""
    experiment = tmp_path / "tiny.toml"
    experiment.write_text(TINY)
    moment = tmp_path / "moment"
    command = (driver("ending_driver"), f"oracle@{moment}", str(experiment), "--cluster", "none")
    job = run_job(4, *command, timeout=120)
    assert job.status != 0
    assert time.time() - float(moment.read_text()) < SOON_SECONDS, job.err
    assert job.err.count("pympa: ") <= 1, job.err
    assert "Error" not in job.err


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("words", "moments"),
    lanes(
        [
            (["-m", "pympa.bench", "ring-dense"], (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)),
            (["-m", "pympa", "bench", "ring-dense"], (0.2, 0.6)),
            (["-m", "pympa", "compare", "a", "b"], (0.15, 0.3)),
        ],
        [2],
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_ctrl_c_at_any_moment(words, moments):
    """Python's own start, before it has found pympa, is the one part that pympa cannot speak in."""
    for moment in moments:
        job = subprocess.Popen(
            [MPIRUN, "-n", "4", sys.executable, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            time.sleep(moment)
            speaks = all_in_pympa(job.pid, 4)
            job.send_signal(signal.SIGINT)
            _, err = job.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
        assert job.returncode != 0, (moment, err)
        assert set(re.findall(r"/pympa/(\w.*?\.py)", err)) <= {"__init__.py"}, (moment, err)
        if "No such file" not in err:  # compare may have told that before
            assert err.count("pympa: ") == err.count("pympa: rank") <= 1, (moment, err)
            assert "interrupted" in err or not speaks, (moment, err)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("missing", lanes([0, 3], [1]))
@pytest.mark.parametrize(
    ("seconds", "comes", "says"),
    lanes(
        [
            (600, "interrupted", "interrupted"),
            (2, "nothing", "MPI did not start within 2 seconds: a task of this job ended before"),
        ],
        [1],
    ),
)
def test_a_rank_that_ends_before_mpi_keeps_no_other_waiting(missing, seconds, comes, says):
    """As one that Ctrl-C catches in Python's own start, which ends it with a status of 1."""
    job = run_job(4, driver("start_driver"), str(missing), str(seconds), comes)
    assert job.status != 0
    assert job.seconds < SOON_SECONDS
    assert job.err.count("pympa: ") == job.err.count(f"pympa: {says}") == 1, job.err


def all_in_pympa(launcher: int, ranks: int) -> bool:
    """Tell whether all ranks of a job have come as far as pympa, or past MPI_Init."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error, OSError):
            if process.name().startswith("python"):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                found.append(holds_interrupts(process.pid) or "libmpi" in maps)
    return len(found) == ranks and all(found)


def holds_interrupts(pid: int) -> bool:
    """Tell whether a process has come as far as to hold back SIGINT: it is in pympa by then."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(fields["SigBlk"], 16) >> (signal.SIGINT - 1) & 1)


def test_ctrl_c_of_a_command_without_mpi():
    for delay in (0.0, 0.3):
        # Half a minute of work, so that it cannot have ended before.
        words = ["-m", "pympa", "footprint", "ring-dense", "--size", "paper", "--plan", "cp=256"]
        command = [sys.executable, *words]
        job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        wait_until(lambda pid=job.pid: holds_interrupts(pid), 30)
        time.sleep(delay)
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=60)
        assert err == "pympa: interrupted\n"
        assert job.returncode in (130, -signal.SIGINT)  # Python may end itself as if unheeded


@pytest.mark.usefixtures("nothing_left")
def test_segments_lose_their_names_before_the_first_file_is_read():
    """A command that is killed while it reads leaves nothing: `--list` on a slow file."""
    job = run_job(2, *altered_job("killed_in_reading"), "--list", "x.toml", timeout=30)
    assert job.status != 0


@pytest.mark.usefixtures("nothing_left")
def test_one_rank_fails_on_its_way_into_the_session():
    job = run_job(4, driver("ending_driver"), "", "--backend", "cuda", timeout=60)
    assert job.status != 0
    assert job.err.count("pympa: rank") == job.err.count("Traceback") == 1, job.err
    assert "RuntimeError: planned: no device today" in job.err


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("how", lanes(["late", "SIGSTOP"], [0]))
def test_a_rank_that_stays_away_is_not_waited_for(how, tmp_path: Path):
    experiment = tmp_path / "tiny.toml"
    experiment.write_text(TINY)
    moment = tmp_path / "moment"
    job = run_job(
        4, driver("ending_driver"), f"{how}@{moment}", str(experiment), "--timeout", "2",
        timeout=120,
    )  # fmt: skip
    assert job.status != 0
    assert re.search(r"rank \d waited 2 s on (world|cp) for messages", job.err)
    assert time.time() - float(moment.read_text()) < 2 + SOON_SECONDS
