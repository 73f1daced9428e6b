"""What jobs of this suite may leave behind: files in /dev/shm, and ranks that still run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHM = Path("/dev/shm")
# Every process that this suite starts has it in its environment, whoever its parent is.
MARK = os.environ.setdefault("PYMPA_TEST_SUITE", str(os.getpid()))


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Fail if the body leaves a file in /dev/shm or a process of this suite's jobs."""
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
            driven = any("support/drivers/" in word for word in words)
            if driven and is_of_this_suite(folder):
                found.append(" ".join(words))
    return found
