"""Jobs under a Slurm of our own: the batch scripts, and how steps end."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pympa.bench.records.record import Record
from support.experiments import TINY
from support.jobs import driver, wait_until
from support.lanes import FULL, lanes
from support.slurm import SOON_SECONDS, Cluster, own_slurm

DRIVER = driver("ending_driver")
LONG = """
title = "seconds of steps"
dtype = "float32"
[sizes.local]
batch = 1
tokens = 4096
[sizes.local.model]
d_model = 32
vocabulary = 256
layers = [{ repeat = 2, heads = 4, head_dim = 8, mlp_hidden = 64 }]
[[plans]]
role = "proposed"
family = "ring"
"""


def read_records(path: Path) -> list[Record]:
    """Read records; a line that is not intact raises."""
    text = path.read_bytes()
    assert text.endswith(b"\n")
    return [msgspec.json.decode(line, type=Record) for line in text.splitlines()]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    with own_slurm() as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm: Cluster, tmp_path: Path, nothing_left: None) -> Iterator[Cluster]:
    yield Cluster(slurm.environment, tmp_path)
    slurm.clear()


def test_one_node_script_gives_verified_records(cluster: Cluster):
    tiny = cluster.write("tiny.toml", TINY)
    job = cluster.submit("one_node.sbatch", tiny, "--dtype", "float16", options=["-n", "4"])
    assert cluster.end_state(job) == "COMPLETED", cluster.log(job)
    records = read_records(cluster.home / f"pympa-{job}.jsonl")
    assert [record.role for record in records] == ["baseline", "proposed"]
    for record in records:
        assert (record.ranks, record.verified, record.dtype) == (4, True, "float16")
    assert "tokens/s" in cluster.log(job)


@FULL
def test_two_nodes_script_spreads_one_world_over_both_nodes(cluster: Cluster):
    tiny = cluster.write("tiny.toml", TINY)
    job = cluster.submit("two_nodes.sbatch", tiny, options=["--ntasks-per-node=2"])
    assert cluster.end_state(job) == "COMPLETED", cluster.log(job)
    assert "NodeList=n[1-2]" in cluster.run("scontrol", "show", "job", job).out
    records = read_records(cluster.home / f"pympa-{job}.jsonl")
    assert [(record.ranks, record.verified) for record in records] == [(4, True)] * 2


@FULL
def test_gpu_script_asks_for_a_gpu_a_rank_and_ends_with_one_message_where_they_are_none(
    cluster: Cluster,
):
    tiny = cluster.write("tiny.toml", TINY)
    options = ["--ntasks-per-node=2", "--cpus-per-task=1"]
    job = cluster.submit("two_nodes_gpus.sbatch", tiny, options=options)
    assert cluster.end_state(job) == "FAILED", cluster.log(job)
    shown = cluster.run("scontrol", "show", "job", job).out
    assert "NodeList=n[1-2]" in shown
    assert "gres:gpu:8" in shown
    assert cluster.log(job).count("pympa: backend cuda: ") == 1, cluster.log(job)
    assert not (cluster.home / f"pympa-{job}.jsonl").exists()


@FULL
def test_array_script_gives_each_task_one_experiment_and_all_options(cluster: Cluster):
    job = cluster.submit("array.sbatch", "--list", options=["-n", "1", "--array=0,1,99"])
    assert sorted(cluster.end_state(job).split()) == ["COMPLETED", "COMPLETED", "FAILED"]
    first, second = cluster.log(f"{job}_0"), cluster.log(f"{job}_1")
    assert "ring-dense " in first
    assert "ring-dense-fp16 " not in first
    assert "ring-dense-fp16 " in second
    assert "index 99, but only" in cluster.log(f"{job}_99")


@FULL
def test_scancel_ends_all_ranks_and_keeps_the_records(cluster: Cluster):
    tiny, long = cluster.write("tiny.toml", TINY), cluster.write("long.toml", LONG)
    job = cluster.submit("one_node.sbatch", tiny, long, "--iterations", "100", options=["-n", "4"])
    log = cluster.home / f"pympa-{job}.log"
    wait_until(lambda: log.exists() and "long: proposed" in log.read_text(), 60)
    assert len(cluster.processes()) > 4
    cluster.run("scancel", job)
    wait_until(lambda: not cluster.processes(), SOON_SECONDS)
    assert cluster.end_state(job) == "CANCELLED"
    records = read_records(cluster.home / f"pympa-{job}.jsonl")
    assert [(record.experiment, record.verified) for record in records] == [("tiny", True)] * 2


@FULL
def test_usr1_ends_the_job_cleanly_after_the_plan_in_hand(cluster: Cluster):
    tiny = cluster.write("tiny.toml", TINY)
    job = cluster.submit("one_node.sbatch", tiny, "--iterations", "200", options=["-n", "4"])
    log = cluster.home / f"pympa-{job}.log"
    wait_until(lambda: log.exists() and "tiny: baseline" in log.read_text(), 60)
    cluster.run("scancel", "--signal=USR1", job)  # as --signal=USR1@60 does near the time limit
    assert cluster.end_state(job) == "COMPLETED", cluster.log(job)
    assert "stopped by SIGUSR1" in cluster.log(job)
    records = read_records(cluster.home / f"pympa-{job}.jsonl")
    assert [record.role for record in records] == ["baseline"]


@pytest.mark.parametrize(
    ("how", "options"),
    lanes(
        [
            ("exception", []),
            ("exit", []),
            ("SIGKILL", []),
            ("SIGTERM", []),
            ("SIGSTOP", ["--timeout", "4"]),
        ],
        [2],
    ),
)
def test_a_rank_that_breaks_ends_the_step(cluster: Cluster, how: str, options: list[str]):
    tiny = cluster.write("tiny.toml", TINY)
    moment = cluster.home / "moment"
    moment.unlink(missing_ok=True)
    job = cluster.srun(DRIVER, f"{how}@{moment}", tiny, "--output", "records.jsonl", *options)
    broke = float(moment.read_text())
    assert time.time() - broke < SOON_SECONDS, job.err
    assert job.status != 0
    wait_until(lambda: not cluster.processes(), broke + SOON_SECONDS - time.time())
    records = read_records(cluster.home / "records.jsonl")
    assert [(record.role, record.verified) for record in records] == [("baseline", True)]


def test_worlds_of_one_in_a_step_of_four_are_refused(cluster: Cluster):
    tiny = cluster.write("tiny.toml", TINY)
    bench = ["python", "-m", "pympa.bench", tiny, "--output", "records.jsonl"]
    job = cluster.run("srun", "--mpi=none", "-n", "4", *bench)
    assert job.status != 0
    assert job.err.count("srun --mpi=pmi2") == 1, job.err
    assert not (cluster.home / "records.jsonl").exists()
