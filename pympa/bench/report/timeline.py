"""`--trace FILE.json`: one step of each plan on all ranks, in Chrome's trace event format.

https://ui.perfetto.dev shows such files. Each rank of each plan is a process with three threads:
the step, its computing and its waiting; messages in flight are asynchronous events beside them.
Times are on rank 0's clock, and 0 is the time at which the first rank starts the step. Every plan
starts at 0, so that plans are shown one below the other and can be compared.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pympa.bench.measure.clocks import Offset, clock_offsets
from pympa.bench.records.record import Record
from pympa.runtime.step import Step
from pympa.text.files import refuse_special
from pympa.transport import Transport

Event = dict[str, Any]

_THREADS = ("step", "compute", "wait")
_HEAD, _TAIL = b'{"displayTimeUnit":"ms","traceEvents":[\n', b"\n]}\n"


class TimelineFile:
    """The timelines of a job's plans, in a file that is valid after each plan.

    Args:
        path: the path of the file, which the first plan replaces; None writes nothing.
        rank: the number of this rank; rank 0 writes.
        beside: the path of another file that the job writes, or None.

    Raises:
        ValueError: both paths are the same file.
        OSError: the file cannot be written; the message names it.
    """

    def __init__(self, path: str | None, *, rank: int, beside: str | None = None) -> None:
        self._path = None if path is None else Path(path).resolve()
        self._bytes = 0  # of the file without its tail
        self._processes = 0
        if self._path is None:
            return
        if beside is not None and Path(beside).resolve() == self._path:
            raise ValueError(
                f"--trace {path}: expected another file than --output; got the same file"
            )
        if rank == 0:
            _check_writable(self._path)

    def add(self, record: Record, step: Step, clock: Callable[[], float], world: Transport) -> None:
        """Add one step of a plan. Collective.

        Args:
            record: the record of the plan.
            step: the step on this rank.
            clock: a function that returns this rank's time, the clock of `step`.
            world: the transport over the ranks of the plan.
        """
        if self._path is None:
            return
        offsets = clock_offsets(world, clock)
        steps = world.gather_objects(step, root=0)
        if steps:
            self.write(record, steps, offsets)

    def write(self, record: Record, steps: Sequence[Step], offsets: Sequence[Offset]) -> None:
        """Add one step of a plan, given the step of every rank.

        Args:
            record: the record of the plan.
            steps: the step on each rank.
            offsets: the offsets of the ranks' clocks.
        """
        if self._path is not None:
            repetition = f" (repeat {record.repeat})" if record.repeat > 1 else ""
            name = f"{record.experiment} {record.plan} {record.role}{repetition}"
            self._append(self._path, plan_events(name, steps, offsets, 1 + self._processes))
            self._processes += len(steps)

    def _append(self, path: Path, events: Iterable[Event]) -> None:
        """Write a copy of the file with more events, and replace the file by it."""
        part = _part(path)
        try:
            if self._bytes and path.exists():
                shutil.copyfile(path, part)
            else:
                part.write_bytes(_HEAD)
                self._bytes = len(_HEAD)
            with part.open("r+b") as file:
                file.truncate(self._bytes)
                file.seek(self._bytes)
                for event in events:
                    comma = b",\n" if file.tell() > len(_HEAD) else b""
                    file.write(comma + msgspec.json.encode(event))
                self._bytes = file.tell()
                file.write(_TAIL)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise OSError(f"--trace {path}: {error.strerror}") from None


def plan_events(
    name: str, steps: Sequence[Step], offsets: Sequence[Offset], first_process: int
) -> Iterator[Event]:
    """Return the events of one plan.

    Args:
        name: the name of the plan.
        steps: the step on each rank.
        offsets: the offsets of the ranks' clocks.
        first_process: the number of rank 0's process; the other ranks' numbers follow.
    """
    zero = min(s.start + offset.seconds for s, offset in zip(steps, offsets, strict=True))
    for rank, (step, offset) in enumerate(zip(steps, offsets, strict=True)):
        process = first_process + rank
        yield from _names(process, f"{name}, rank {rank}")
        yield from _rank_events(process, step, zero - offset.seconds, offset.error_seconds)


def _names(process: int, name: str) -> Iterator[Event]:
    """Return the names of a process and its threads, and their order in a viewer."""
    common = {"ph": "M", "pid": process}
    yield {**common, "name": "process_name", "args": {"name": name}}
    yield {**common, "name": "process_sort_index", "args": {"sort_index": process}}
    for index, thread in enumerate(_THREADS):
        of_thread = {**common, "tid": _thread(process, thread)}
        yield {**of_thread, "name": "thread_name", "args": {"name": thread}}
        yield {**of_thread, "name": "thread_sort_index", "args": {"sort_index": index}}


def _rank_events(process: int, step: Step, zero: float, error_seconds: float) -> Iterator[Event]:
    """Return the step, spans and messages of one rank.

    Args:
        process: the number of the rank's process.
        step: the step, on the rank's clock.
        zero: the seconds that this clock shows at time 0.
        error_seconds: the largest possible error of `zero`.
    """

    def at(seconds: float) -> int:
        return round(1e9 * (seconds - zero))

    def span(thread: str, name: str, start: float, stop: float, **more: Any) -> Event:
        ts, dur = at(start) / 1e3, (at(stop) - at(start)) / 1e3
        common = {"ph": "X", "pid": process, "tid": _thread(process, thread)}
        return {**common, "cat": thread, "name": name, "ts": ts, "dur": dur, **more}

    times = step.times()
    waited = sum(times.waits.values())
    seconds = {
        "compute": times.compute,
        "exposed wait": waited,
        "other": times.step - times.compute - waited,
        "hidden": times.hidden,
        "error of this clock": error_seconds,
    }
    args = {f"{name} (ms)": round(1e3 * value, 6) for name, value in seconds.items()}
    yield span("step", "step", step.start, step.stop, args=args)
    for s in step.spans:
        yield span(s.kind, s.name, s.start, s.stop)
    for number, flight in enumerate(step.flights):
        name = f"{flight.axis} {'receive' if flight.received else 'send'}"
        common = {"cat": "message", "name": name, "id2": {"local": f"{number:#x}"}, "pid": process}
        common["tid"] = _thread(process, "step")
        what = {"axis": flight.axis, "peer": flight.peer, "bytes": flight.nbytes}
        yield {**common, "ph": "b", "ts": at(flight.start) / 1e3, "args": what}
        yield {**common, "ph": "e", "ts": at(flight.stop) / 1e3}


def _thread(process: int, name: str) -> int:
    """Return the number of a thread, which viewers want to differ between processes."""
    return len(_THREADS) * process + _THREADS.index(name)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _check_writable(path: Path) -> None:
    try:
        refuse_special(path)
        if path.exists():
            path.open("r+b").close()  # a read-only file is not replaced
        _part(path).touch()
        _part(path).unlink()
    except OSError as error:
        raise OSError(f"--trace {path}: {error.strerror}") from None
