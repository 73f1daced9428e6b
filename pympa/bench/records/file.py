"""Files of records: one JSON line for each measured plan."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from pympa.bench.records.record import SCHEMAS, Record
from pympa.plan.mesh import PlanError, parse_plan
from pympa.text.files import open_to_append, read_file

LARGEST_FILE_BYTES = 256 << 20  # 10,000 records of 1,000 ranks
_MOST_DIGITS = 18  # of a whole number: bytes and tokens have fewer, and a float can hold them
_START = b'{"schema":'  # the start of a record's line


class RecordFile:
    """Appends records to a file; each is on the disk before the next plan starts.

    Args:
        path: a path of a file of JSON lines; None writes nothing.

    Raises:
        OSError: the file cannot be written; the message names it.
    """

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._append(b"")

    def write(self, record: Record) -> None:
        """Append one line and flush it to the disk."""
        self._append(msgspec.json.encode(record) + b"\n")

    def read(self) -> list[Record]:
        """Return the records of the file; complete its last line, or remove it if it is cut short.

        Raises:
            OSError: the file does not exist or cannot be read.
            ValueError: a line is not a record of a known schema.
        """
        if self._path is None:
            return []
        whole, newline, cut = self._read(self._path).rpartition(b"\n")
        records = _decode(whole, str(self._path))
        if cut and not cut.startswith(_START[: len(cut)]):
            raise ValueError(f"{self._path}: the last line is not a record")
        if cut and _is_record(cut):
            self._append(b"\n")
            return [*records, *_decode(cut, str(self._path))]
        if cut:
            os.truncate(self._path, len(whole) + len(newline))
        return records

    def end_line(self) -> None:
        """Make sure that a new record starts on a new line.

        Raises:
            ValueError: the last line is not a complete record.
        """
        if self._path is None or not self._path.is_file():
            return
        cut = self._read(self._path).rpartition(b"\n")[2]
        if cut and not _is_record(cut):
            raise ValueError(
                f"--output {self._path}: the last line is cut short; use --resume to remove it, or "
                "give another file"
            )
        if cut:
            self._append(b"\n")

    @staticmethod
    def load(path: str) -> list[Record]:
        """Return all records of a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: a line is not a record of a known schema.
        """
        try:
            lines = read_file(path, LARGEST_FILE_BYTES)
        except OSError as error:
            raise OSError(f"{path}: {error.strerror}") from None
        return _decode(lines, path)

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            return read_file(path, LARGEST_FILE_BYTES)
        except OSError as error:
            raise OSError(f"--output {path}: {error.strerror}") from None

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        try:
            with open(self._path, "ab", opener=open_to_append) as file:
                file.write(line)
                file.flush()
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # only regular files can sync
                    os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"--output {self._path}: {error.strerror}") from None


def _is_record(line: bytes) -> bool:
    try:
        _record(line)
    except ValueError:
        return False
    return True


def _decode(lines: bytes, path: str) -> list[Record]:
    records = []
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            records.append(_record(line))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not a record: {error}") from None
    return records


def _record(line: bytes) -> Record:
    """Return the record of a line.

    Raises:
        ValueError: the line is not a record, or has values that no run writes.
    """
    try:
        record = msgspec.json.decode(line, type=Record)
        forecast = [record.forecast.plan] if record.forecast else []
        for plan in (record.plan, *record.searched, *forecast):
            parse_plan(plan)
    except (msgspec.MsgspecError, PlanError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if record.schema not in SCHEMAS or not (record.tps > 0 and record.step_seconds.median > 0):
        raise ValueError(
            f"expected schema {' or '.join(map(str, SCHEMAS))}, and tps and step_seconds above 0; "
            f"got {record.schema}, {record.tps:g} and {record.step_seconds.median:g}"
        )
    if broken := _broken(record):
        raise ValueError(broken)
    return record


def _broken(record: Record) -> str | None:
    """Return the reason why tables cannot show a record, or None."""
    forecast, experts = record.forecast, record.experts
    if not record.flops_per_token > 0:
        return f"flops_per_token: expected a number above 0; got {record.flops_per_token:g}"
    if forecast is not None and not forecast.simulated_tps > 0:
        return f"forecast: simulated_tps: expected a number above 0; got {forecast.simulated_tps:g}"
    if (record.error is None) != (record.tolerance is None):
        return "error, tolerance: expected both or neither"
    if experts is not None and (
        not experts.rows or not experts.rows[0] or len({len(rows) for rows in experts.rows}) > 1
    ):
        return "experts: expected the same number of experts in each layer, at least one"
    if len(str(max(_whole_numbers(msgspec.to_builtins(record)), default=0))) > _MOST_DIGITS:
        return f"expected whole numbers of at most {_MOST_DIGITS} digits"
    return None


def _whole_numbers(value: Any) -> Iterator[int]:
    """Yield the whole numbers in a JSON value."""
    if isinstance(value, int):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        yield from _whole_numbers(part)
