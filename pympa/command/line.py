"""Code that all command lines share: one message for all ranks, and one exit status.

Imports nothing heavy: with 16 ranks on 2 cores, each core runs every import 8 times.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from pympa._start import MpiStart, unlink_shared_files
from pympa.errors import RefusedError
from pympa.hardware.caches import MOST_THREADS
from pympa.session.launch import launched_tasks, refuse_singletons
from pympa.text.escape import shown

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from pympa.session.team import Team
    from pympa.transport.choice import DeviceTransport

MOST, MOST_BYTES = 10**9, 1e18  # the limits of arguments: more is a typing error
_POLL_SECONDS = 2e-3
_START_SECONDS = 600.0  # thousands of ranks that load Python from one disk need minutes
_GRACE_SECONDS = 3.0  # after an interrupt; ranks that start normally handle it by then
_BYTES = {"": 1, "B": 1, "kB": 1000, "KB": 1000, "KiB": 1024} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("MGT", 2)
    for unit, base in (("B", 1000), ("iB", 1024))
}
REFUSED = 2
"""Exit status of a refused request, as in argparse."""


INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as in shells."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises on errors, so that only rank 0 prints and exits."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            RefusedError: always.
        """
        raise RefusedError(f"{message}; {self.prog} --help lists the options")


def command_line(main: Callable[[Sequence[str]], int]) -> int:
    """Run this process's command line and return its exit status.

    Ctrl-C prints one line, and any other error on one rank ends all ranks.

    The interrupt is blocked until all ranks have passed MPI_Init (`disagree`). If a rank ended
    earlier, the others would wait for it in MPI_Init, and shared memory would remain. If a rank has
    ended nevertheless, `MpiStart` ends the others.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _open_standard_streams()
    try:
        return main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            from pympa.session.ending import end_job

            end_job(mpi.COMM_WORLD.Get_rank(), error, mpi.COMM_WORLD.Abort)
        if not isinstance(error, KeyboardInterrupt):
            raise
        complain(RefusedError("interrupted"))
        return INTERRUPTED


def _open_standard_streams() -> None:
    """Open /dev/null for closed streams (`>&-`); the next opened file would get their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            file = os.open(os.devnull, os.O_RDWR)
            if file != number:
                os.dup2(file, number)
                os.close(file)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def unblock_interrupts() -> None:
    """Let Ctrl-C end this process again; see `command_line`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def start(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace | int:
    """Parse the command line on all ranks. Collective.

    Returns:
        The options; or the exit status if nothing is left to do: the ranks disagree, the arguments
        are refused, or --help was given.
    """
    if disagree(arguments):
        return REFUSED
    try:
        options = parser.parse_args(arguments)
    except RefusedError as error:
        refused = error
        return once(lambda: complain(refused))
    return once(lambda: print(parser.format_help()) or 0) if options.help else options


def add_batch(parser: Parser) -> None:
    """Add the options of a model that is no experiment: its batch, and fields to ignore."""
    add = parser.add_argument
    add(
        "--tokens",
        type=count(1),
        metavar="N",
        help="tokens of each sequence, for a model directory or a file with only a model (4096)",
    )
    add(
        "--batch",
        type=count(1),
        metavar="N",
        help="number of sequences, for a model directory or a file with only a model (1)",
    )
    add(
        "--ignore-field",
        action="append",
        metavar="NAME",
        help="go on without a field of config.json that this version does not know; repeatable",
    )


def count(least: int, most: int = MOST) -> Callable[[str], int]:
    """Return an argument type: a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or float(text) < least:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}; got {text!r}")
        if float(text) > most:
            raise argparse.ArgumentTypeError(f"expected a number of at most {most:,}; got {text!r}")
        return int(text)

    return number


thread_count = count(1, MOST_THREADS)


def threads(text: str) -> int | None:
    """Parse an argument: the number of threads of each rank, or None for `auto`."""
    return None if text == "auto" else thread_count(text)


def seconds(text: str) -> float:
    """Parse an argument: a number of seconds above 0."""
    try:
        value = float(text) if text.isascii() else -1.0
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0; got {text!r}")
    return value


def byte_count(text: str) -> int:
    """Parse an argument: a number of bytes, as in 65536, 50MB (10^6) or 2MiB (2^20)."""
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    value = float(parts[1]) * _BYTES.get(parts[2], 0) if parts else 0
    if not 1 <= value < MOST_BYTES:
        raise argparse.ArgumentTypeError(
            f"expected at least 1 byte, as in 65536, 50MB or 2MiB; got {text!r}"
        )
    return int(value)


def number_list(numbers: Sequence[int]) -> str:
    """Return ascending numbers in the form 0-3,8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][-1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def disagree(arguments: Sequence[str]) -> bool:
    """Return whether a rank's command line differs from rank 0's; rank 0 reports it. Collective."""
    task = launched_tasks(os.environ).number
    start = MpiStart(task=task, grace_seconds=_GRACE_SECONDS, most_seconds=_START_SECONDS)
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    _wait_for_all(world)
    start.stop()
    unlink_shared_files()
    unblock_interrupts()
    lines = world.allgather(list(arguments))
    others = [rank for rank, line in enumerate(lines) if line != lines[0]]
    if others and world.Get_rank() == 0:
        first = others[0]
        complain(
            RefusedError(
                "arguments: expected the same on all ranks; rank 0 has "
                f"{' '.join(lines[0])!r}, rank {first} has {' '.join(lines[first])!r}"
            )
        )
    return bool(others)


def once(work: Callable[[], int]) -> int:
    """Run a function on rank 0 only, and return its exit status on all ranks. Collective.

    A RefusedError, ValueError or OSError is printed in one line and gives the status `REFUSED`.
    """
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    status = None
    if world.Get_rank() == 0:
        try:
            refuse_singletons(world.Get_size(), os.environ)
            status = work()
        except (ValueError, OSError) as error:
            alone = world.Get_size() == 1 and launched_tasks(os.environ).number > 0
            status = REFUSED if alone else complain(error)
        except BaseException as error:
            from pympa.session.ending import end_job

            unlink_shared_files()
            end_job(0, error, world.Abort)
    _wait_for_all(world)
    return int(world.bcast(status) or 0)


def _wait_for_all(world: Comm) -> None:
    """Wait for all ranks by polling: a blocking MPI call would occupy the core of working ranks."""
    arrived = world.Ibarrier()
    while not arrived.Test():
        time.sleep(_POLL_SECONDS)


def complain(error: Exception) -> int:
    """Print one message, in one line, and return the status of a refused request."""
    print(f"pympa: {shown(str(error))}", file=sys.stderr, flush=True)
    return REFUSED


def in_session(
    body: Callable[[Team], int],
    *,
    isa: str | None,
    threads: int | None,
    timeout_seconds: float,
    shares_memory: bool,
    backend: str = "cpu",
    device_transport: DeviceTransport = "auto",
) -> int:
    """Run a function on all ranks in a session and return the exit status. Collective.

    Args:
        body: a function of the session's ranks; it may raise RefusedError on all ranks together.
        isa: the name of an instruction set, or None for the best.
        threads: the number of threads of each rank, or None for an even share of the cores.
        timeout_seconds: the longest time that a rank waits for a message.
        shares_memory: see `Session`.
        backend: see `Session`.
        device_transport: see `Session`.
    """
    from pympa.session.session import Session

    session = Session(
        isa=isa,
        threads=threads,
        timeout_seconds=timeout_seconds,
        shares_memory=shares_memory,
        backend=backend,
        device_transport=device_transport,
    )
    try:
        with session:
            return body(session.team)
    except RefusedError as error:
        return complain(error) if session.rank == 0 else REFUSED
