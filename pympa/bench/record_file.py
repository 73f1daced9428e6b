"""Files of records: one JSON line for each measured plan."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from pympa.bench.record import SCHEMA, Record

_START = b'{"schema":'  # of a record's line


class RecordFile:
    """Appends records to a file; each is on the disk before the next plan starts.

    Args:
        path: JSON lines; None writes nothing.

    Raises:
        OSError: the file cannot be written; its message names it.
    """

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._append(b"")

    def write(self, record: Record) -> None:
        """Append one line and flush it to the disk."""
        self._append(msgspec.json.encode(record) + b"\n")

    def read(self) -> list[Record]:
        """Return the records already there; a last line gets its end, or is removed if cut short.

        Raises:
            ValueError: a line is no record of this schema.
        """
        if self._path is None:
            return []
        whole, newline, cut = self._path.read_bytes().rpartition(b"\n")
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
        """Make sure that a new record gets a line of its own.

        Raises:
            ValueError: the file ends within a record.
        """
        if self._path is None or not self._path.is_file():
            return
        cut = self._path.read_bytes().rpartition(b"\n")[2]
        if cut and not _is_record(cut):
            raise ValueError(
                f"--output {self._path}: the last line is cut short; --resume takes it away, or "
                "give another file"
            )
        if cut:
            self._append(b"\n")

    @staticmethod
    def load(path: str) -> list[Record]:
        """Return all records of a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: a line is no record of this schema.
        """
        try:
            lines = Path(path).read_bytes()
        except OSError as error:
            raise OSError(f"{path}: {error.strerror}") from None
        return _decode(lines, path)

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe or device cannot sync
                    os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"--output {self._path}: {error.strerror}") from None


def _is_record(line: bytes) -> bool:
    try:
        msgspec.json.decode(line, type=Record)
    except msgspec.DecodeError:
        return False
    return True


def _decode(lines: bytes, path: str) -> list[Record]:
    records = []
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            record = msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: line {number} is not a record: {error}") from None
        if record.schema != SCHEMA or not (record.tps > 0 and record.step_seconds.median > 0):
            raise ValueError(
                f"{path}: line {number} is not a record: expected schema {SCHEMA}, and tps and "
                f"step_seconds above 0; got {record.schema}, {record.tps:g} and "
                f"{record.step_seconds.median:g}"
            )
        records.append(record)
    return records
