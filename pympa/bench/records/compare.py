"""`pympa compare A.jsonl B.jsonl`: two runs of the same plans, their ratio and the noise."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pympa.command.line import Parser, once, start

if TYPE_CHECKING:
    from pympa.bench.records.record import Record
    from pympa.text.table import Table

Key = tuple[str, str, str, str, str, int]


@dataclass(frozen=True)
class Comparison:
    """One plan in two runs.

    Attributes:
        key: the experiment, size, dtype, role, clock and number of ranks.
        plans: the plan in each run (a searched number of micro-batches may differ).
        tps: the median tokens/s of each run.
        ratio: the second run's tokens/s over the first run's.
        noise: half the relative spread of the noisier run; a smaller difference means nothing.
        single: whether a run has only one record; the noise is then that of its steps.
    """

    key: Key
    plans: tuple[str, str]
    tps: tuple[float, float]
    ratio: float
    noise: float
    single: bool

    @property
    def verdict(self) -> str:
        """The result in words."""
        if abs(self.ratio - 1) <= self.noise:
            return "within the noise"
        return "faster" if self.ratio > 1 else "slower"


def build_parser(prog: str = "pympa compare") -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description="Compare the records of two runs.", add_help=False)
    parser.add_argument("before", nargs="?", metavar="A.jsonl", help="records of the first run")
    parser.add_argument("after", nargs="?", metavar="B.jsonl", help="records of the second run")
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the comparison and return the exit status."""
    options = start(build_parser(), arguments)
    if isinstance(options, int):
        return options
    return once(lambda: _print_comparison(options.before, options.after))


def _print_comparison(before: str | None, after: str | None) -> int:
    if before is None or after is None:
        raise ValueError("expected two files of records: pympa compare A.jsonl B.jsonl")
    from pympa.bench.records.file import RecordFile
    from pympa.text.table import show

    found = compare(RecordFile.load(before), RecordFile.load(after))
    if not found:
        raise ValueError(f"{before} and {after} have no plan in common")
    show(comparison_table(found))
    return 0


def comparison_table(found: Sequence[Comparison]) -> Table:
    """Return one row for each plan in two runs."""
    from pympa.bench.report.table import plan_cell
    from pympa.text.table import Table

    single = "noise of a plan with one record: between its steps only; --repeat N shows more"
    table = Table(caption=[single] if any(c.single for c in found) else [], keys=3)
    for heading in ("experiment", "role", "plan"):
        table.add_column(heading, text=True)
    for heading in ("ranks", "tps A", "tps B", "B / A", "noise"):
        table.add_column(heading)
    table.add_column("", text=True)
    for c in found:
        experiment, size, dtype, role, _, ranks = c.key
        table.add_row(
            f"{experiment} ({size}, {dtype})",
            role,
            plan_cell(c.plans[0] if c.plans[0] == c.plans[1] else " -> ".join(c.plans)),
            str(ranks),
            f"{c.tps[0]:,.0f}",
            f"{c.tps[1]:,.0f}",
            f"{c.ratio:.3f}",
            f"±{c.noise:.1%}",
            c.verdict,
        )
    return table


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Comparison]:
    """Pair the records of two runs that are equal in everything but speed."""
    first, second = _grouped(before), _grouped(after)
    return [_paired(key, first[key], second[key]) for key in first if key in second]


def _grouped(records: Sequence[Record]) -> dict[Key, list[Record]]:
    groups: defaultdict[Key, list[Record]] = defaultdict(list)
    for r in records:
        role = r.role if r.role != "given" else f"given {r.plan}"
        groups[r.experiment, r.size, r.dtype, role, r.clock, r.ranks].append(r)
    return groups


def _paired(key: Key, before: Sequence[Record], after: Sequence[Record]) -> Comparison:
    tps = tuple(statistics.median(r.tps for r in records) for records in (before, after))
    return Comparison(
        key,
        (before[0].plan, after[0].plan),
        (tps[0], tps[1]),
        tps[1] / tps[0],
        max(_noise(before), _noise(after)),
        min(len(before), len(after)) == 1,
    )


def _noise(records: Sequence[Record]) -> float:
    """Return half the relative spread of the repeats' medians, or of the steps of one run."""
    if len(records) > 1:
        seconds = [r.step_seconds.median for r in records]
        low, high = min(seconds), max(seconds)
    else:
        low, high = records[0].step_seconds.min, records[0].step_seconds.max
    return (high - low) / 2 / statistics.median(r.step_seconds.median for r in records)
