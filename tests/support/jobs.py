"""Starts jobs as users do, with a time limit each, and leaves nothing of them behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVERS = Path(__file__).parent / "drivers"
"""Programs that jobs of tests run: main jobs that are broken on purpose, or on emulated GPUs."""

MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


def driver(name: str) -> str:
    """Return the path of one of the programs that jobs run."""
    return str(DRIVERS / f"{name}.py")


def altered_job(what: str) -> tuple[str, str]:
    """Return the start of a command line for a main job with one thing changed."""
    return driver("altered_job"), what


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
