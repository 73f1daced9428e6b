"""Jobs under a Slurm of our own: two nodes on loopback, in a temporary directory, all real."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest

import conftest
from pympa.bench.record import Record

SCRIPTS = conftest.ROOT / "bench" / "slurm"
DRIVER = str(conftest.ROOT / "tests" / "ending_driver.py")
SOON_SECONDS = 15
FIRST_PORT = 16817  # away from Slurm's own 6817, where a real daemon may listen
SBIN = ["/usr/sbin", "/sbin"]  # where the daemons are; not every user's PATH has it

# 64 CPUs a node, whatever the machine has: ranks share cores rather than wait for each other's.
# Without NoInAddrAny daemons would listen on all networks. Jobs are numbered from a random start,
# because MPICH names shared memory by job and step: where a job killed in MPI_Init left its file,
# the next one of the same number hangs there.
CONFIGURATION = """
ClusterName=pympa
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmctldPidFile={home}/slurmctld.pid
SlurmdSpoolDir={home}/%n
SlurmdPidFile={home}/%n.pid
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {what_nodes_have}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {what_nodes_have}
PartitionName=test Nodes=ALL Default=YES State=UP
"""
NODE = "CPUs=64 CoresPerSocket=64 Gres=gpu:8"
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


@dataclass(frozen=True)
class Cluster:
    """Slurm's commands for one test, which has a directory of its own."""

    environment: dict[str, str]
    home: Path

    def run(self, *command: str, timeout: float = 60) -> conftest.Finished:
        return conftest.run_command(
            *command, timeout=timeout, cwd=self.home, environment=self.environment
        )

    def srun(self, *command: str, mpi: str = "pmi2") -> conftest.Finished:
        """Run `python *command` as a step of four ranks, in the way of the scripts."""
        return self.run("srun", f"--mpi={mpi}", "-K1", "-n", "4", "python", *command)

    def submit(self, script: str, *arguments: str, options: Sequence[str] = ()) -> str:
        path = str(SCRIPTS / script)
        submitted = self.run("sbatch", "--parsable", *options, path, *arguments)
        assert submitted.status == 0, submitted.err
        return submitted.out.strip()

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", job)
        return " ".join(re.findall(r"JobState=(\w+)", shown.out)) or shown.err

    def end_state(self, job: str) -> str:
        """Wait for a job; `sbatch --wait` looks so seldom that it adds half a minute."""
        conftest.wait_until(
            lambda: not re.search("PENDING|RUNNING|COMPLETING", self.state(job)), 60
        )
        return self.state(job)

    def log(self, job: str) -> str:
        return (self.home / f"pympa-{job}.log").read_text()

    def write(self, name: str, text: str) -> str:
        (self.home / name).write_text(text)
        return name

    def processes(self) -> list[psutil.Process]:
        """Find the ranks of all jobs, and the shells of batch scripts, by their environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                own = process.environ()
                if own.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found += [process] if "SLURM_PROCID" in own else []
        return found

    def clear(self) -> None:
        """End what a failed test left."""
        self.run("scancel", "--quiet", "--user", "root")
        with suppress(AssertionError):
            conftest.wait_until(lambda: not self.processes(), SOON_SECONDS)
        for process in self.processes():
            process.kill()


def read_records(path: Path) -> list[Record]:
    """Read records; a line that is not intact raises."""
    text = path.read_bytes()
    assert text.endswith(b"\n")
    return [msgspec.json.decode(line, type=Record) for line in text.splitlines()]


def missing(path: str) -> str | None:
    if os.geteuid() != 0:
        return "slurmd needs root"
    for program in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv"):
        if shutil.which(program, path=path) is None:
            return f"{program} not found: apt-get install slurm-wlm munge"
    return None


def free_ports(count: int, held: ExitStack) -> list[int]:
    """Return ports that no other suite on this machine takes until `held` is closed."""
    found = []
    for port in range(FIRST_PORT, FIRST_PORT + 1000):
        with suppress(OSError), socket.socket() as probe:
            claim = held.enter_context(socket.socket(socket.AF_UNIX))
            claim.bind(f"\0pympa-tests-port-{port}")
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    pytest.fail(f"no {count} free ports from {FIRST_PORT}")


@contextmanager
def daemon(environment: dict[str, str], log: Path, *command: str) -> Iterator[None]:
    """Run a daemon in the foreground, so that its pid is known; it dies if the tests are killed."""
    with log.open("w") as out:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Start munged, slurmctld and two slurmd; end them all."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], *SBIN])
    if reason := missing(path):
        pytest.skip(reason)
    # Not under pytest's directory: paths of sockets may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory, ExitStack() as daemons:
        home = Path(directory)
        for folder in ("state", "n1", "n2"):
            (home / folder).mkdir()
        configuration, key = home / "slurm.conf", home / "munge.key"
        host = socket.gethostname().split(".")[0]
        configuration.write_text(
            CONFIGURATION.format(
                host=host,
                home=home,
                ports=free_ports(3, daemons),
                first_job=random.randrange(1, 60_000_000),
                what_nodes_have=NODE,
            )
        )
        for gpu in range(8):  # that Slurm counts and hands out; nothing can run on them
            (home / f"gpu{gpu}").touch()
        (home / "gres.conf").write_text(f"Name=gpu File={home}/gpu[0-7]\n")
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI"))}
        environment = {**outer, "PATH": path, "SLURM_CONF": str(configuration)}
        munge_files = [f"--{file}-file={home}/munged.{file}" for file in ("log", "pid", "seed")]
        for name, command in {
            "munged": [
                "munged", "--foreground", "--force", f"--socket={home}/munge.socket",
                f"--key-file={key}", *munge_files,
            ],
            "slurmctld": ["slurmctld", "-D"],
            "n1": ["slurmd", "-D", "-N", "n1"],
            "n2": ["slurmd", "-D", "-N", "n2"],
        }.items():  # fmt: skip
            log = home / f"{name}.out"
            daemons.enter_context(daemon(environment, log, *command))
            if name == "munged":
                conftest.wait_until((home / "munge.socket").exists, 10)
        cluster = Cluster(environment, home)
        try:
            conftest.wait_until(
                lambda: cluster.run("sinfo", "-hNo", "%T").out.split() == ["idle"] * 2, 30
            )
        except AssertionError:
            logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in home.glob("*.out")]
            pytest.fail("Slurm does not start\n" + "\n".join(logs))
        yield cluster
        cluster.clear()


@pytest.fixture
def cluster(slurm: Cluster, tmp_path: Path, nothing_left: None) -> Iterator[Cluster]:
    yield Cluster(slurm.environment, tmp_path)
    slurm.clear()


def test_one_node_script_gives_verified_records(cluster: Cluster):
    tiny = cluster.write("tiny.toml", conftest.TINY)
    job = cluster.submit("one_node.sbatch", tiny, "--dtype", "float16", options=["-n", "4"])
    assert cluster.end_state(job) == "COMPLETED", cluster.log(job)
    records = read_records(cluster.home / f"pympa-{job}.jsonl")
    assert [record.role for record in records] == ["baseline", "proposed"]
    for record in records:
        assert (record.ranks, record.verified, record.dtype) == (4, True, "float16")
    assert "tokens/s" in cluster.log(job)


def test_two_nodes_script_spreads_one_world_over_both_nodes(cluster: Cluster):
    tiny = cluster.write("tiny.toml", conftest.TINY)
    job = cluster.submit("two_nodes.sbatch", tiny, options=["--ntasks-per-node=2"])
    assert cluster.end_state(job) == "COMPLETED", cluster.log(job)
    assert "NodeList=n[1-2]" in cluster.run("scontrol", "show", "job", job).out
    records = read_records(cluster.home / f"pympa-{job}.jsonl")
    assert [(record.ranks, record.verified) for record in records] == [(4, True)] * 2


def test_gpu_script_asks_for_a_gpu_a_rank_and_ends_with_one_message_where_they_are_none(
    cluster: Cluster,
):
    tiny = cluster.write("tiny.toml", conftest.TINY)
    options = ["--ntasks-per-node=2", "--cpus-per-task=1"]
    job = cluster.submit("two_nodes_gpus.sbatch", tiny, options=options)
    assert cluster.end_state(job) == "FAILED", cluster.log(job)
    shown = cluster.run("scontrol", "show", "job", job).out
    assert "NodeList=n[1-2]" in shown
    assert "gres:gpu:8" in shown
    assert cluster.log(job).count("pympa: backend cuda: ") == 1, cluster.log(job)
    assert not (cluster.home / f"pympa-{job}.jsonl").exists()


def test_array_script_gives_each_task_one_experiment_and_all_options(cluster: Cluster):
    job = cluster.submit("array.sbatch", "--list", options=["-n", "1", "--array=0,1,99"])
    assert sorted(cluster.end_state(job).split()) == ["COMPLETED", "COMPLETED", "FAILED"]
    first, second = cluster.log(f"{job}_0"), cluster.log(f"{job}_1")
    assert "ring-dense " in first
    assert "ring-dense-fp16 " not in first
    assert "ring-dense-fp16 " in second
    assert "index 99, but only" in cluster.log(f"{job}_99")


def test_scancel_ends_all_ranks_and_keeps_the_records(cluster: Cluster):
    tiny, long = cluster.write("tiny.toml", conftest.TINY), cluster.write("long.toml", LONG)
    job = cluster.submit("one_node.sbatch", tiny, long, "--iterations", "100", options=["-n", "4"])
    log = cluster.home / f"pympa-{job}.log"
    conftest.wait_until(lambda: log.exists() and "long: proposed" in log.read_text(), 60)
    assert len(cluster.processes()) > 4
    cluster.run("scancel", job)
    conftest.wait_until(lambda: not cluster.processes(), SOON_SECONDS)
    assert cluster.end_state(job) == "CANCELLED"
    records = read_records(cluster.home / f"pympa-{job}.jsonl")
    assert [(record.experiment, record.verified) for record in records] == [("tiny", True)] * 2


def test_usr1_ends_the_job_cleanly_after_the_plan_in_hand(cluster: Cluster):
    tiny = cluster.write("tiny.toml", conftest.TINY)
    job = cluster.submit("one_node.sbatch", tiny, "--iterations", "200", options=["-n", "4"])
    log = cluster.home / f"pympa-{job}.log"
    conftest.wait_until(lambda: log.exists() and "tiny: baseline" in log.read_text(), 60)
    cluster.run("scancel", "--signal=USR1", job)  # as --signal=USR1@60 does near the time limit
    assert cluster.end_state(job) == "COMPLETED", cluster.log(job)
    assert "stopped by SIGUSR1" in cluster.log(job)
    records = read_records(cluster.home / f"pympa-{job}.jsonl")
    assert [record.role for record in records] == ["baseline"]


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("exception", []),
        ("exit", []),
        ("SIGKILL", []),
        ("SIGTERM", []),
        ("SIGSTOP", ["--timeout", "4"]),
    ],
)
def test_a_rank_that_breaks_ends_the_step(cluster: Cluster, how: str, options: list[str]):
    tiny = cluster.write("tiny.toml", conftest.TINY)
    moment = cluster.home / "moment"
    moment.unlink(missing_ok=True)
    job = cluster.srun(DRIVER, f"{how}@{moment}", tiny, "--output", "records.jsonl", *options)
    broke = float(moment.read_text())
    assert time.time() - broke < SOON_SECONDS, job.err
    assert job.status != 0
    conftest.wait_until(lambda: not cluster.processes(), broke + SOON_SECONDS - time.time())
    records = read_records(cluster.home / "records.jsonl")
    assert [(record.role, record.verified) for record in records] == [("baseline", True)]


def test_worlds_of_one_in_a_step_of_four_are_refused(cluster: Cluster):
    tiny = cluster.write("tiny.toml", conftest.TINY)
    bench = ["python", "-m", "pympa.bench", tiny, "--output", "records.jsonl"]
    job = cluster.run("srun", "--mpi=none", "-n", "4", *bench)
    assert job.status != 0
    assert job.err.count("srun --mpi=pmi2") == 1, job.err
    assert not (cluster.home / "records.jsonl").exists()
