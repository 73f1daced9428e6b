"""Stopping and going on, comparing, and the console command."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pympa.bench.records.compare import compare
from pympa.bench.records.file import RecordFile
from pympa.bench.records.record import Record, spread
from pympa.bench.report.table import result_table
from pympa.errors import RefusedError
from pympa.runtime.step import Overlap
from pympa.session.launch import launched_tasks, refuse_singletons
from support.experiments import TINY
from support.jobs import MPIRUN, ROOT, Finished, altered_job, run_command, run_job, wait_until
from support.lanes import FULL, lanes
from support.records import make_record


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def bench(ranks: int, *arguments: object, **options: float) -> Finished:
    return run_job(ranks, "-m", "pympa.bench", *map(str, arguments), **options)


def test_resume_measures_what_is_missing(tiny, tmp_path):
    output = tmp_path / "r.jsonl"
    whole = bench(2, tiny, "--output", output, "--repeat", 2)
    assert whole.status == 0, whole.err
    lines = output.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    # As if the job had died while it wrote the third record.
    output.write_bytes(b"".join(lines[:2]) + lines[2][:100])
    resumed = bench(2, tiny, "--output", output, "--repeat", 2, "--resume")
    assert resumed.status == 0, resumed.err
    records = RecordFile.load(str(output))
    assert [(r.repeat, r.role) for r in records] == [
        (repeat, role) for repeat in (1, 2) for role in ("baseline", "proposed")
    ]
    assert output.read_bytes().splitlines(keepends=True)[:2] == lines[:2]
    done = bench(2, tiny, "--output", output, "--repeat", 2, "--resume")
    assert done.status == 0
    assert "oracle" not in done.err
    assert len(RecordFile.load(str(output))) == 4
    assert done.out.count("baseline") > 0, "what was measured before is in the table"
    # Another way of measuring is not the same record.
    other = bench(2, tiny, "--output", output, "--iterations", 2, "--resume")
    assert other.status == 0
    assert len(RecordFile.load(str(output))) == 6


def test_resume_refuses_another_instruction_set(tiny, tmp_path):
    output = tmp_path / "r.jsonl"
    options = (tiny, "--output", output, "--plan", "cp=2", "--cluster", "none")
    first = bench(2, *options, "--isa", "portable")
    assert first.status == 0, first.err
    before = output.read_bytes()
    resumed = bench(2, *options, "--isa", "amx_emulated", "--resume", timeout=60)
    assert resumed.status == 2
    message = "--resume: expected records of instruction set amx_emulated, which this job uses"
    assert resumed.err.count(message) == 1
    assert "got portable; continue with --isa portable" in resumed.err
    assert output.read_bytes() == before
    # Without --resume both are in one file, as records of different jobs.
    assert bench(2, *options, "--isa", "amx_emulated").status == 0
    assert len({record.job for record in RecordFile.load(str(output))}) == 2


@pytest.mark.parametrize("text", ["a note\nwithout an end", "a note", '{"schema": 2}\n{"sch'])
def test_resume_leaves_other_files_alone(text, tmp_path):
    path = tmp_path / "note.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a record"):
        RecordFile(str(path)).read()
    assert path.read_text() == text


def test_sigusr1_finishes_the_plan_and_stops(tiny, tmp_path):
    output = tmp_path / "r.jsonl"
    command = [
        MPIRUN, "-n", "2", sys.executable, "-m", "pympa.bench", str(tiny), "--output",
        str(output), "--repeat", "1000",
    ]  # fmt: skip
    job = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        wait_until(lambda: output.exists() and output.stat().st_size > 0, 90)
        job.send_signal(signal.SIGUSR1)  # mpirun hands it on to its ranks
        out, err = job.communicate(timeout=90)
    finally:
        job.kill()
    assert job.returncode == 0, err
    assert "stopped by SIGUSR1" in err
    assert 1 <= len(RecordFile.load(str(output))) < 1000
    assert "tokens, float32" in out, "the table of what was measured"


def test_compare_tells_noise_from_change():
    before = [make_record(tps=t, repeat=i, step_seconds=spread([8 / t]))
              for i, t in enumerate((95.0, 100.0, 105.0))]  # fmt: skip
    (same,) = compare(before, [make_record(tps=103.0)])
    assert same.verdict == "within the noise"
    (faster,) = compare(before, [make_record(tps=130.0)])
    assert faster.verdict == "faster"
    assert faster.ratio == pytest.approx(1.3)
    (slower,) = compare(before, [make_record(tps=80.0)])
    assert slower.verdict == "slower"
    assert compare(before, [make_record(ranks=4), make_record(clock="simulated")]) == []


def test_records_from_before_overlap_still_load():
    fields = msgspec.to_builtins(make_record(overlap={"cp": Overlap(3, 1, 2)}))
    assert msgspec.convert(fields, Record).overlap == {"cp": Overlap(3, 1, 2)}
    del fields["overlap"], fields["hidden_seconds"]
    earlier = msgspec.convert(fields, Record)
    assert earlier.overlap is earlier.hidden_seconds is None
    assert "overlap" not in result_table("t", [[earlier]]).caption


def test_the_table_tells_what_was_hidden():
    overlap = {"tp": Overlap(0.001, 0.001, 0.0), "cp": Overlap(0.0123, 0.000492, 0.011808)}
    told = result_table("t", [[make_record(overlap=overlap)]]).caption
    assert "tp=2: overlap: cp 96% of 12.3 ms in flight hidden; tp 0% of 1 ms in flight" in told
    shared = result_table("t", [[make_record(overlap=overlap, oversubscribed=True)]]).caption
    assert "exposed waiting and overlap are n/a" in shared
    assert "hidden" not in shared


def console(*words: str, ranks: int = 1) -> Finished:
    return run_job(ranks, "-m", "pympa", *words, timeout=60)


def test_compare_from_the_console(tmp_path):
    for name, tps in (("a", 100.0), ("b", 150.0)):
        line = msgspec.json.encode(make_record(tps=tps)) + b"\n"
        (tmp_path / f"{name}.jsonl").write_bytes(line)
    job = console("compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert job.status == 0, job.err
    assert "1.500" in job.out
    assert "noise of a plan with one record" in job.out
    assert "faster" in job.out
    (tmp_path / "b.jsonl").write_bytes(b'{"schema":1}\n')
    broken = console("compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert broken.status == 2
    assert "line 1 is not a record" in broken.err


def test_console_lists_its_commands_once():
    job = console("--help", ranks=2)
    assert job.status == 0
    for name in ("bench", "kernels", "compare", "info"):
        assert len(re.findall(rf"^ +{name} +\w", job.out, re.M)) == 1, job.out
    assert console("--version").out.startswith("pympa 0.")
    for shell in ("bash", "zsh"):
        script = console("--completion", shell)
        assert script.status == 0
        assert "--iterations" in script.out
    wrong = console("brunch", ranks=2)
    assert wrong.status == 2
    assert wrong.err.count("pympa: ") == 1


@pytest.mark.parametrize("ranks", [1, 3])
def test_info(ranks):
    job = run_job(ranks, "-m", "pympa", "info", timeout=60)
    assert job.status == 0, job.err
    shown = f"ranks 0-{ranks - 1}" if ranks > 1 else "ranks 0 on"
    for word in ("Python", "MPI", "threads multiple", shown, "instruction sets", "caches", "GPU"):
        assert job.out.count(word) >= 1, word
    assert job.out.count("mpi4py") == 1
    for extra in re.findall(r"install it with: (.*?) \(", job.out):
        assert re.fullmatch(r"pip install 'pympa\[\w+\]'", extra)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
@pytest.mark.parametrize("ranks", lanes([1, 3], [1]))
def test_no_gpu_is_refused_in_one_line(ranks):
    job = run_job(ranks, "-m", "pympa.bench", "ring-dense", "--backend", "cuda")
    assert job.status != 0
    assert job.seconds < 60
    assert re.fullmatch(r"pympa: backend cuda: .*\n", job.err), job.err


@pytest.mark.parametrize(
    ("size", "environment", "tasks"),
    [
        (1, {}, (1, 0, "")),
        (1, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (1, 0, "")),
        (4, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (4, 3, "Slurm step")),
        (1, {"SLURM_NTASKS": "4"}, (1, 0, "")),  # an allocation, and no step of it
        (1, {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}, (1, 0, "")),
        (2, {"PMIX_RANK": "1"}, (2, 1, "launch by PMIx")),
        (1, {"PMI_SIZE": "four"}, (1, 0, "")),
    ],
)
def test_worlds_that_are_right(size, environment, tasks):
    """As many ranks as tasks are none to refuse: the call raises nothing."""
    assert launched_tasks(environment) == tasks
    assert tasks[0] == size
    refuse_singletons(size, environment)


@pytest.mark.parametrize(
    ("environment", "number", "says"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, 2, "this Slurm step has 4 tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, 1, "by OpenMPI has 4 tasks"),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, 3, "launch by PMI has 4 tasks"),
        ({"PMIX_RANK": "3"}, 3, "launch by PMIx has more tasks"),
        (
            {"SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
            0,
            "by OpenMPI has 4 tasks",
        ),
    ],
)
def test_a_world_of_one_among_several_tasks(environment, number, says):
    with pytest.raises(RefusedError, match=rf"{says}.*srun --mpi=pmi2 -K1 -n 4 python -m"):
        refuse_singletons(1, environment)
    assert launched_tasks(environment).number == number


SINGLE = """
import sys
from pympa import Session
with Session() as session:
    print("computes alone")
"""


@pytest.mark.parametrize("number", ["0", "2"])
def test_a_session_in_a_world_of_one_among_several_tasks(tmp_path, number):
    """A user's program ends at once, with one message of the first task."""
    program = tmp_path / "single.py"
    program.write_text(SINGLE)
    for count, rank in (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
                        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):  # fmt: skip
        environment = {**os.environ, count: "4", rank: number}
        job = run_command(sys.executable, str(program), timeout=60, environment=environment)
        assert job.status != 0
        assert job.out == ""
        told = [line for line in job.err.splitlines() if line.startswith("pympa: ")]
        assert ["sees a world of one rank" in line for line in told] == [True] * (number == "0")


def test_ranks_that_got_other_arguments():
    job = run_job(4, *altered_job("other_arguments=2"), "ring-dense", timeout=30)
    assert job.status != 0
    assert job.err.count("pympa: ") == 1
    assert "rank 0 has 'ring-dense', rank 2 has '--list'" in job.err


@pytest.mark.parametrize(
    ("content", "says"),
    lanes([
        (b"", "the file is empty"),
        (b"\xff\xfe\x00", "broken.toml: "),
        (b"title = ", "broken.toml: "),
        (TINY.replace("batch", "bacth").encode(),
         "unknown field `bacth` - at `$.sizes[...]`; did you mean `batch`?"),
        (TINY.replace("tokens = 32", "tokens = 0").encode(), "at least 1; got 2 and 0"),
        (TINY.replace('"ring"', '"rign"').encode(), "expected one of baseline, ring"),
        (TINY.replace('"proposed"', f'"{"p" * 61}"').encode(),
         "plans: role: expected at most 60 characters; got 61"),
        (b"plans = []" + TINY.partition("[[plans]]")[0].encode(),
         "broken.toml: plans: expected at least one plan, or --plan; got none"),
    ], [0, 3, 5]),
)  # fmt: skip
def test_broken_experiments(tmp_path, content, says):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    job = bench(4, path, timeout=60)
    assert job.status == 2
    assert says in job.err
    assert job.err.count("pympa: ") == 1, job.err
    assert "Traceback" not in job.err


@pytest.mark.parametrize("words", [("bench", "--list"), ("info",), ("footprint", "stages")])
def test_a_closed_standard_output_is_none_to_write_to(words):
    plan = ("--plan", "tp=8,pp=2") if "footprint" in words else ()
    closed = ("bash", "-c", 'exec "$@" >&-', "bash", sys.executable, "-m", "pympa", *words, *plan)
    job = run_command(*closed, timeout=60)
    assert (job.status, job.err) == (0, "")


@FULL
def test_an_experiment_without_plans_takes_those_it_is_given(tmp_path):
    path = tmp_path / "bare.toml"
    path.write_text("plans = []" + TINY.partition("[[plans]]")[0])
    assert bench(2, path, "--plan", "cp=2", timeout=60).status == 0
    simulated = ("-m", "pympa.bench", "--backend", "virtual", "--cluster", "h200", str(path))
    job = run_command(sys.executable, *simulated, timeout=60)
    assert (job.status, job.err.count("plans: expected at least one")) == (2, 1)


def test_a_crash_of_rank_0_alone_leaves_nothing_behind(nothing_left):
    code = "from pympa.command.line import once; once(lambda: 1 // 0)"
    job = run_job(2, "-c", code)
    assert job.status != 0
    assert "ZeroDivisionError" in job.err


def test_a_gigabyte_is_no_experiment(tmp_path):
    path = tmp_path / "huge.toml"
    path.touch()
    os.truncate(path, 1 << 30)
    job = bench(4, path, timeout=60)
    assert job.status == 2
    assert "expected at most 1,048,576 bytes" in job.err
    assert job.seconds < 30


@FULL
@pytest.mark.usefixtures("nothing_left")
def test_disk_full_and_empty_input(tiny, tmp_path):
    full = bench(4, tiny, "--output", "/dev/full", timeout=60)
    assert full.status != 0
    assert full.err.count("pympa: ") == 1, full.err
    assert "No space left on device" in full.err
    assert "Traceback" not in full.err
    empty = tmp_path / "empty"
    empty.touch()
    job = bench(4, tiny, "--input", empty, timeout=60)
    assert job.status == 2
    assert "at least one byte of text; got an empty file" in job.err
    no_output = bench(4, tiny, "--resume", timeout=60)
    assert no_output.status == 2
    assert "--resume needs --output" in no_output.err
