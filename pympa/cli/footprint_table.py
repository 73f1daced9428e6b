"""The tables of `pympa footprint`: memory by rank and by layer, working sets, printed figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from pympa.bench.report.published_figures import Figure
from pympa.command.line import number_list
from pympa.footprint.fits import Fit
from pympa.footprint.survey import Survey
from pympa.runtime.ledger import USES
from pympa.text.table import Table

_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 1000}
_READABLE = 10  # a unit is used if the largest number is at least this many of it
T = TypeVar("T")


def rank_table(title: str, survey: Survey, cache_bytes: int | None) -> Table:
    """Return what each rank needs; ranks with equal needs share a row.

    Args:
        title: the title of the table.
        survey: the survey of a plan.
        cache_bytes: the bytes of a rank's cache; None where they are not known.
    """
    unit = _unit(need.total_bytes for need in survey.ranks)
    uses = [use for use in USES if any(need.uses[use] for need in survey.ranks)]
    cache = "" if cache_bytes is None else f"; the cache of a rank has {_readable(cache_bytes)}"
    caption = f"{unit} at the arena's high-water mark, and its parts by use{cache}"
    table = _table(title, caption, "ranks", "parameters", *uses, "total", "working set")
    for numbers, need in _folded(survey.ranks):
        table.add_row(
            number_list(numbers),
            f"{need.parameters:,}",
            *(_in(unit, need.uses[use]) for use in uses),
            _in(unit, need.total_bytes),
            _in(unit, need.working_set.total),
        )
    return table


def layer_table(survey: Survey) -> Table:
    """Return what each layer needs on the rank that needs most for it."""
    uses = [use for use in USES if any(need.uses.get(use) for need in survey.layers)]
    unit = _unit(need.total_bytes for need in survey.layers)
    stages = [need.stage for need in survey.layers]
    counts = ", ".join(str(stages.count(stage)) for stage in sorted(set(stages)))
    caption = (
        f"{unit} on the rank that needs most for the layer; layers of each stage: {counts}; "
        "parameters are those of the whole layer"
    )
    table = _table("by layer", caption, "layers", "parameters", *uses, "total")
    for numbers, need in _folded(survey.layers):
        table.add_row(
            number_list(numbers),
            f"{need.parameters:,}",
            *(_in(unit, need.uses[use]) for use in uses),
            _in(unit, need.total_bytes),
        )
    return table


def working_set_table(survey: Survey, fitting: Sequence[int | None]) -> Table:
    """Return the working set of each layer's step.

    Args:
        survey: the survey of a plan.
        fitting: the rows of the largest chunk that fits the cache, by stage; None if the cache is
            not known.
    """
    steps = [(need.working_set, fitting[need.stage]) for need in survey.layers]
    unit = _unit(touched.total for touched, _ in steps)
    table = _table(
        f"working set of a step over {survey.chunk_rows:,} rows",
        f"{unit}, each part at its maximum; largest chunk: the most rows that fit the cache",
        "layers",
        "weight tile",
        "activation chunk",
        "operator buffers",
        "intermediate state",
        "working set",
        "largest chunk",
    )
    for numbers, (touched, rows) in _folded(steps):
        sizes = (
            touched.weight_tile,
            touched.activation_chunk,
            touched.operator_buffers,
            touched.intermediate_state,
            touched.total,
        )
        shown = "-" if rows is None else f"{rows:,}"
        table.add_row(number_list(numbers), *(_in(unit, size) for size in sizes), shown)
    return table


def fit_table(fit: Fit, lengths: Sequence[int]) -> Table:
    """Return whether a plan fits a memory with all keys and values, and what the most is.

    Args:
        fit: what was found.
        lengths: the number of tokens of each sequence.
    """
    unit = _unit([fit.needed_bytes])
    answer = "fits" if fit.fits else "does not fit"
    caption = (
        f"{unit} with the keys and values of all layers over the whole context; the most tokens of "
        f"{len(lengths):,} and the most sequences of {max(lengths):,} tokens, to half a percent"
    )
    headings = ("needed", "keys/values", "available", "most tokens", "most sequences")
    table = _table(f"{answer} {fit.memory.name}", caption, "memory", *headings)
    table.add_row(
        "each" if fit.memory.ranks == 1 else "all ranks",
        _in(unit, fit.needed_bytes),
        _in(unit, fit.kv_bytes),
        _in(unit, fit.memory.size_bytes),
        f"{fit.longest:,}",
        f"{fit.most_sequences:,}",
    )
    return table


def figure_table(title: str, figures: Iterable[Figure]) -> Table:
    """Return a paper's figures beside those that its dimensions give."""
    table = _table(title, "", "quantity", "printed", "computed")
    table.add_column("from", text=True)
    table.add_column("verdict", text=True)
    for f in figures:
        values = (
            _readable(value) if f.is_bytes else f"{value:,.0f}" for value in (f.printed, f.given)
        )
        table.add_row(f.name, *values, f.how, f.verdict)
    return table


def _table(title: str, caption: str, first: str, *others: str) -> Table:
    table = Table(title, [caption] if caption else [])
    table.add_column(first, text=True)
    for heading in others:
        table.add_column(heading.replace(" ", "\n"))
    return table


def _folded(needs: Sequence[T]) -> list[tuple[list[int], T]]:
    """Group the numbers of equal needs, in the order of the first of each."""
    rows: list[tuple[list[int], T]] = []
    for number, need in enumerate(needs):
        for numbers, other in rows:
            if other == need:
                numbers.append(number)
                break
        else:
            rows.append(([number], need))
    return rows


def _unit(totals: Iterable[int]) -> str:
    most = max(totals)
    return next((unit for unit, size in _UNITS.items() if most >= _READABLE * size), "kB")


def _in(unit: str, size: int) -> str:
    return f"{size / _UNITS[unit]:,.3f}"


def _readable(size: float) -> str:
    unit = next((unit for unit, of_unit in _UNITS.items() if size >= of_unit), "kB")
    return f"{size / _UNITS[unit]:,.2f} {unit}"
