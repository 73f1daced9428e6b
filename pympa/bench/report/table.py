"""The list of experiments, and the result table of each experiment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pympa.bench.experiment.description import Experiment
from pympa.bench.records.record import Record, StageUse
from pympa.bench.report.results import Result, Statistic, measured_results
from pympa.plan.mesh import parse_plan
from pympa.plan.rules import idle_line
from pympa.runtime.step import Overlap
from pympa.text.table import Cell, Table

_OPTION = re.compile(",(ulysses|micro_batches|balance|cp_scheme|dim_algo)")  # each on its own line
_MOST_EXPERTS = 16  # the number of experts whose rows are printed


def experiment_list(experiments: dict[str, Experiment]) -> Table:
    """Return one row for each experiment and size."""
    table = Table()
    for heading in ("experiment", "seed", "size", "batch × tokens"):
        table.add_column(heading, text=True)
    table.add_column("layers")
    for heading in ("dtype", "plans", "what"):
        table.add_column(heading, text=True)
    for name, experiment in experiments.items():
        for size_name, size in experiment.sizes.items():
            label = size_name if size.ours is None else f"{size_name} (ours)"
            plans = ", ".join(f"{p.role}: {p.family or p.plan}" for p in experiment.plans)
            table.add_row(
                name,
                experiment.seed or "-",
                label,
                str(size),
                str(len(size.model.blocks)),
                experiment.dtype,
                plans,
                experiment.title,
            )
    return table


def result_table(
    title: str,
    rows: Sequence[Sequence[Record]],
    notes: Sequence[str] = (),
    *,
    scales: bool = False,
) -> Table:
    """Return one row for each plan of an experiment.

    Args:
        title: the title of the table.
        rows: the records of each plan, one for each repeat; the one of median speed is shown.
        notes: the first lines of the caption.
        scales: whether rows differ in their ranks; they are compared with the one of the fewest.
    """
    results = measured_results(rows, scales=scales)
    records = [result.record for result in results]
    shared = any(record.oversubscribed for record in records)
    reads = any(result.bytes_read for result in results)
    forecasts = any(result.forecast for result in results)
    joules = any(record.joules_per_token for record in records)
    table = Table(title, [*notes, *_caption(results, scales)])
    table.add_column("plan", text=True)
    for heading in (
        "ranks",
        "tps",
        "ms/token\n(1/tps)",
        ("speed-up\nover fewest" if scales else "ratio to\nbaseline")
        + ("\n(total work)" if shared else ""),
        "exposed\ncomm",
        "flops /\nuseful",
        "MB sent",
        *(["MB read\nin place"] if reads else []),
        "peak MB\nper rank",
        "roofline",
        "error /\ntolerance",
        "published\ntps",
        "published\nratio",
        *(["simulated\ntps, ratio"] if forecasts else []),
        *(["joules /\ntoken"] if joules else []),
    ):
        table.add_column(heading)
    for result in results:
        r = result.record
        table.add_row(
            [*plan_cell(r.plan), r.role],
            str(r.ranks),
            _statistic(result.tps, ",.0f"),
            f"{r.tpot_ms:.4g}",
            _statistic(result.ratio, ".2f"),
            "n/a" if r.comm_fraction is None else f"{r.comm_fraction:.1%}",
            f"{r.performed_flops:.2f}",
            f"{result.bytes_sent / 1e6:,.1f}",
            *([f"{result.bytes_read / 1e6:,.1f}"] if reads else []),
            f"{r.peak_bytes.max / 1e6:,.1f}",
            f"{r.roofline_fraction:.1%}",
            _error(r),
            _number(r.published_tps, ",.0f"),
            _number(result.published_ratio, ".2f"),
            *([_forecast(result)] if forecasts else []),
            *([_number(r.joules_per_token, ".3g")] if joules else []),
        )
    return table


def plan_cell(plan: str) -> list[str]:
    """Return the lines of a table cell: a plan, with each option on its own line."""
    return _OPTION.sub(r",\n\1", plan).split("\n")


def _error(record: Record) -> Cell:
    if record.error is None:
        return "unverified"
    text = f"{record.error:.1e} / {record.tolerance:.1e}"
    return text if record.exact else (text, "not exact")


def _statistic(value: Statistic | None, form: str) -> Cell:
    """Return the median, and the range below it if there are several values."""
    if value is None:
        return "-"
    text = format(value.median, form)
    return text if value.values == 1 else (text, f"{value.least:{form}}..{value.most:{form}}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _forecast(result: Result) -> Cell:
    """Return the simulated tokens/s at the paper's size, and below them the baseline ratio."""
    found = result.forecast
    if found is None:
        return "-"
    lines = [f"{found.simulated_tps:,.0f}"]
    if result.forecast_ratio is not None:
        lines.append(f"{result.forecast_ratio:.2f}")
    return lines if found.fits else [*lines, "does not fit"]


def _caption(results: Sequence[Result], scales: bool) -> list[str]:
    records, lines = [result.record for result in results], []
    crowds = sorted({record.ranks for record in records if record.oversubscribed})
    if crowds:
        cores = records[0].environment.cores
        what = "GPUs" if records[0].backend == "cuda" else "cores"
        lines.append(
            f"oversubscribed: {' or '.join(map(str, crowds))} ranks share {cores} {what}, so "
            "ratios compare total work, not speed-up, and exposed waiting and overlap are n/a"
        )
    used = records[0].environment
    if used.isa_note is not None:
        lines.append(f"instruction set: {used.isa_note}")
    if used.device is not None:
        lines.append(f"computed on {used.device}; route between GPUs: {used.route}")
    clusters = {record.forecast.cluster for record in records if record.forecast}
    if clusters:
        lines.append(
            f"simulated, not measured: the paper's size on {', '.join(clusters)}, with the "
            "fastest number of micro-batches there"
        )
    if scales and len({record.flops_per_token for record in records}) > 1:
        lines.append("the model grows with the ranks, so speed-up counts flops/s, not tokens/s")
    if any(result.bytes_read for result in results):
        lines.append(
            "MB sent: bytes in messages of all ranks; MB read in place: keys and values that ranks "
            "read from other ranks' shared memory, without messages"
        )
    elif any(result.bytes_sent for result in results):
        lines.append("MB sent: bytes in messages of all ranks; no shared memory was read")
    cuts_to_cache = any(r.stages and r.stages.cut_to_cache for r in records)
    for r in records:
        if r.searched:
            tried = ", ".join(
                f"{parse_plan(plan).micro_batches}: {tps:,.0f}" for plan, tps in r.searched.items()
            )
            lines.append(f"{r.role}: fastest of these micro_batches (with their tps): {tried}")
        if r.idle_ranks:
            lines.append(idle_line(parse_plan(r.plan), r.idle_ranks))
        if r.forecast and r.forecast.idle_ranks:
            lines.append(
                f"simulated: {idle_line(parse_plan(r.forecast.plan), r.forecast.idle_ranks)}"
            )
        if r.sampled_rows is not None:
            lines.append(
                f"{r.plan}: only {r.sampled_rows} sampled rows are checked; the oracle of all "
                "rows would take too long"
            )
        if not r.exact:
            lines.append(
                f"{r.role}: this plan computes another model; its error is the difference from the "
                "exact model"
            )
        if r.router_skew is not None:
            lines.append(f"{r.role}: the gate is skewed by --router-skew {r.router_skew:g}")
        if r.overlap and not r.oversubscribed:
            lines.append(f"{r.plan}: overlap: {_overlaps(r.overlap)}")
        if r.stages and cuts_to_cache:
            lines.append(f"{r.role}: {_stages(r.stages)}")
        if r.bubble_fraction is not None:
            lines.append(f"{r.plan}: pipeline bubble {r.bubble_fraction:.1%} of the step")
        if r.published_tps and r.published_tpot_ms:
            ours = 1e3 / r.published_tps
            if not 0.9 < r.published_tpot_ms / ours < 1.1:
                lines.append(
                    f"{r.role}: the paper prints {r.published_tpot_ms} ms per token beside "
                    f"{r.published_tps:,.0f} tokens/s, which is {ours:.2g} ms"
                )
    return [*lines, *_expert_lines([r for r in records if r.experts])]


def _stages(use: StageUse) -> str:
    """Return the layers of each stage, and the working set of a chunk beside the cache."""
    counts = [last - first for first, last in use.layers]
    layers = f"{len(counts)} stages of {', '.join(map(str, counts))} layers"
    if len(set(counts)) == 1:
        layers = f"{len(counts)} stages, layers in each: {counts[0]}"
    cache = "unknown; set it with --cache"
    if use.cache_bytes is not None:
        cache = f"{use.cache_bytes / 1e6:,.2f} MB"
        if use.working_set_bytes > use.cache_bytes:
            cache += ", smaller than the working set"
    return (
        f"{layers}; chunks of {use.chunk_rows:,} tokens, working set "
        f"{use.working_set_bytes / 1e6:,.2f} MB, cache {cache}"
    )


def _overlaps(overlap: Mapping[str, Overlap]) -> str:
    """Return the hidden share of the time in flight, by axis, the longest first."""
    parts = []
    for axis, o in sorted(overlap.items(), key=lambda item: -item[1].in_flight):
        share = o.hidden / o.in_flight if o.in_flight else 0.0
        parts.append(f"{axis} {share:.0%} of {1e3 * o.in_flight:.3g} ms in flight hidden")
    return "; ".join(parts)


def _expert_lines(records: Sequence[Record]) -> list[str]:
    """Return the lines on the experts' load and on dropped choices."""
    uses = {r.role: r.experts for r in records if r.experts}
    if not uses:
        return []
    busiest = ", ".join(f"{role} {use.imbalance:.2f}" for role, use in uses.items())
    role, use = next(iter(uses.items()))
    number, rows = max(enumerate(use.rows, 1), key=lambda item: max(item[1]) / max(sum(item[1]), 1))
    shown = ", ".join(map(str, rows[:_MOST_EXPERTS])) + (", ..." if rows[_MOST_EXPERTS:] else "")
    lines = [
        f"experts: rows of the busiest expert over the mean, in the worst layer: {busiest}",
        f"experts: rows in that layer, number {number} of {len(use.rows)} ({role}): {shown}",
    ]
    if any(use.dropped for use in uses.values()):
        dropped = ", ".join(
            f"{role} {use.dropped:,} ({use.dropped_fraction:.1%})" for role, use in uses.items()
        )
        lines.append(f"experts: choices dropped because of full capacity: {dropped}")
    return lines
