"""Shared by all tests. Under `mpirun ... pytest --with-mpi` only tests marked `mpi` run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# A shared machine may stop for longer than hypothesis would allow an example.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

# A shell starts a program in the background with Ctrl-C ignored, and its children inherit that.
# Here Ctrl-C has its usual effect again, for the tests that send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
SHM = Path("/dev/shm")
# Every process that this suite starts has it in its environment, whoever its parent is.
MARK = os.environ.setdefault("PYMPA_TEST_SUITE", str(os.getpid()))
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


TINY = """
title = "tiny"
dtype = "float32"
[sizes.local]
batch = 2
tokens = 32
[sizes.local.model]
d_model = 32
vocabulary = 256
layers = [{ repeat = 2, heads = 4, head_dim = 8, mlp_hidden = 64 }]
[[plans]]
role = "baseline"
family = "baseline"
[[plans]]
role = "proposed"
family = "ring"
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-plans", action="store_true", help="run every plan, not a sample")
    parser.addoption("--gpu", action="store_true", help="run tests/gpu on a GPU, or fail")


@pytest.fixture
def all_plans(request: pytest.FixtureRequest) -> bool:
    """Tell whether every plan and every draw is wanted, which takes ten minutes more."""
    return bool(request.config.getoption("--all-plans"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the MPI part to test_mpirun.py: importing it would make this process an MPI rank."""
    return True if collection_path.name == "mpi" and not _with_mpi(config) else None


def _with_mpi(config: pytest.Config) -> bool:
    return bool(config.getoption("--with-mpi", default=False))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _with_mpi(config):
        return
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() > 1:
        single = [item for item in items if item.get_closest_marker("mpi") is None]
        items[:] = [item for item in items if item.get_closest_marker("mpi") is not None]
        config.hook.pytest_deselected(items=single)


@dataclass
class Finished:
    """A job that ended: exit status, what it printed, and how long it took."""

    status: int
    out: str
    err: str
    seconds: float


def run_job(ranks: int, *arguments: str, timeout: float = 120) -> Finished:
    """Run `mpirun -n ranks python *arguments`, and leave nothing of it behind."""
    if MPIRUN is None:
        pytest.fail("mpirun: not found; install the extra 'mpich'")
    return run_command(MPIRUN, "-n", str(ranks), sys.executable, *arguments, timeout=timeout)


def run_command(
    *command: str, timeout: float, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> Finished:
    """Run a command; past `timeout` seconds kill it and what it started, and fail the test."""
    start = time.monotonic()
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
        pytest.fail(f"{' '.join(command)} ran past {timeout} s\n{out[-2000:]}\n{err[-2000:]}")
    return Finished(job.returncode, out, err, time.monotonic() - start)


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    """Wait for something to become true, and fail the test if it does not in time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """A test with it leaves no file in /dev/shm and no process of this suite's jobs."""
    before = shared_files()
    foreign: set[Path] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            note_foreign(shared_files() - before, foreign)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and rank_processes():
            time.sleep(0.1)
    finally:
        ended.set()
        watcher.join()
    assert not rank_processes()
    left, deadline = shared_files() - before - foreign, time.monotonic() + 2
    while left and time.monotonic() < deadline:  # another job may have made one just now
        time.sleep(0.02)
        note_foreign(left, foreign)
        left &= shared_files() - foreign
    assert not left


def shared_files() -> set[Path]:
    """Return this user's files in /dev/shm."""
    found = set()
    for path in SHM.glob("*"):
        with suppress(OSError):  # it is gone by now
            if path.stat().st_uid == os.getuid():
                found.add(path)
    return found


def note_foreign(new: set[Path], foreign: set[Path]) -> None:
    """Note which files in /dev/shm other jobs on this machine have mapped.

    Whoever is killed may leave some, and then nothing tells any more whose they were.
    """
    for path in new - foreign:
        owners = [is_of_this_suite(process) for process in processes_with(path)]
        if owners and not any(owners):
            foreign.add(path)


def processes_with(path: Path) -> list[Path]:
    """Return the /proc folders of processes that have mapped a file."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            if str(path) in (folder / "maps").read_text():
                found.append(folder)
    return found


def is_of_this_suite(process: Path) -> bool:
    """Tell whether a process was started by this suite, however many others lie between.

    Args:
        process: its folder in /proc.
    """
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return True  # it has just ended; to doubt is to blame ourselves
    return f"PYMPA_TEST_SUITE={MARK}".encode() in environment


def rank_processes() -> list[str]:
    """Return the command lines of ranks started by `run_job` that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            driven = any("ending_driver.py" in word for word in words)
            if driven and is_of_this_suite(folder):
                found.append(" ".join(words))
    return found
