"""A Slurm of our own: two nodes on loopback, in a temporary directory, all real."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from support.jobs import ROOT, Finished, run_command, wait_until

SCRIPTS = ROOT / "bench" / "slurm"
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


@dataclass(frozen=True)
class Cluster:
    """Slurm's commands for one test, which has a directory of its own."""

    environment: dict[str, str]
    home: Path

    def run(self, *command: str, timeout: float = 60) -> Finished:
        return run_command(*command, timeout=timeout, cwd=self.home, environment=self.environment)

    def srun(self, *command: str, mpi: str = "pmi2") -> Finished:
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
        wait_until(lambda: not re.search("PENDING|RUNNING|COMPLETING", self.state(job)), 60)
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
            wait_until(lambda: not self.processes(), SOON_SECONDS)
        for process in self.processes():
            process.kill()


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


@contextmanager
def own_slurm() -> Iterator[Cluster]:
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
                wait_until((home / "munge.socket").exists, 10)
        cluster = Cluster(environment, home)
        try:
            wait_until(lambda: cluster.run("sinfo", "-hNo", "%T").out.split() == ["idle"] * 2, 30)
        except AssertionError:
            logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in home.glob("*.out")]
            pytest.fail("Slurm does not start\n" + "\n".join(logs))
        yield cluster
        cluster.clear()
