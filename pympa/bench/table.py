"""What the user sees: the list of experiments, and a table for each of them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from pympa.bench.experiment import Experiment
from pympa.bench.record import Record, StageUse
from pympa.bench.text_table import Cell, Table
from pympa.mesh import parse_plan
from pympa.rules import told_idle
from pympa.step import Overlap

_OPTION = re.compile(",(ulysses|micro_batches|balance|cp_scheme|dim_algo)")  # on lines of their own
_MOST_EXPERTS = 16  # whose rows are printed


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
        title: of the table.
        rows: the records of each plan, one for each repeat; the one of median speed is shown.
        notes: lines for the caption.
        scales: rows differ in their ranks, and are compared with that of the fewest.
    """
    typical = [_typical(records) for records in rows]
    shared = any(record.oversubscribed for record in typical)
    table = Table(title, [*notes, *_caption(typical, scales)])
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
        "peak MB\nper rank",
        "roofline",
        "error /\ntolerance",
        "published\ntps",
        "published\nratio",
        *(["simulated\ntps, ratio"] if any(r.forecast for r in typical) else []),
        *(["joules /\ntoken"] if any(r.joules_per_token for r in typical) else []),
    ):
        table.add_column(heading)
    baseline = next((records for records in rows if records[0].role == "baseline"), None)
    if scales:
        baseline = min(rows, key=lambda records: records[0].ranks)
    for records, r in zip(rows, typical, strict=True):
        table.add_row(
            [*plan_cell(r.plan), r.role],
            str(r.ranks),
            _spread([record.tps for record in records], ",.0f"),
            f"{r.tpot_ms:.4g}",
            _ratios(records, baseline),
            "n/a" if r.comm_fraction is None else f"{r.comm_fraction:.1%}",
            f"{r.performed_flops:.2f}",
            f"{sum(r.bytes_sent.by_rank) / 1e6:,.1f}",
            f"{r.peak_bytes.max / 1e6:,.1f}",
            f"{r.roofline_fraction:.1%}",
            _error(r),
            "-" if r.published_tps is None else f"{r.published_tps:,.0f}",
            _published_ratio(r, None if baseline is None else baseline[0]),
            *([_forecast(r, baseline)] if any(r.forecast for r in typical) else []),
            *([_joules(r)] if any(r.joules_per_token for r in typical) else []),
        )
    return table


def plan_cell(plan: str) -> list[str]:
    """Return a plan with its options on lines of their own."""
    return _OPTION.sub(r",\n\1", plan).split("\n")


def _error(record: Record) -> Cell:
    if record.error is None:
        return "unverified"
    text = f"{record.error:.1e} / {record.tolerance:.1e}"
    return text if record.exact else (text, "not exact")


def _typical(records: Sequence[Record]) -> Record:
    return sorted(records, key=lambda record: record.tps)[(len(records) - 1) // 2]


def _spread(values: Sequence[float], form: str) -> Cell:
    """Return the median, and the range under it if there are several."""
    text = format(statistics.median(values), form)
    return text if len(values) == 1 else (text, f"{min(values):{form}}..{max(values):{form}}")


def _ratios(records: Sequence[Record], baseline: Sequence[Record] | None) -> Cell:
    """Return the speed over the baseline's of the same repeat, by work where models differ."""
    slow = {record.repeat: _work(record) for record in baseline or ()}
    ratios = [_work(record) / slow[record.repeat] for record in records if record.repeat in slow]
    return _spread(ratios, ".2f") if ratios else "-"


def _work(record: Record) -> float:
    """Return the useful flops/s: tokens/s, but fair to a model that grows with the ranks."""
    return record.tps * record.flops_per_token


def _published_ratio(record: Record, baseline: Record | None) -> str:
    if baseline is None or not record.published_tps or not baseline.published_tps:
        return "-"
    return f"{record.published_tps / baseline.published_tps:.2f}"


def _forecast(record: Record, baseline: Sequence[Record] | None) -> Cell:
    """Return what is simulated at the paper's size, over the baseline's below it."""
    found = record.forecast
    if found is None:
        return "-"
    lines = [f"{found.simulated_tps:,.0f}"]
    base = baseline[0].forecast if baseline else None
    if base is not None:
        lines.append(f"{found.simulated_tps / base.simulated_tps:.2f}")
    return lines if found.fits else [*lines, "does not fit"]


def _joules(record: Record) -> str:
    return "-" if record.joules_per_token is None else f"{record.joules_per_token:.3g}"


def _caption(records: Sequence[Record], scales: bool) -> list[str]:
    lines = []
    crowds = sorted({record.ranks for record in records if record.oversubscribed})
    if crowds:
        cores = records[0].environment.cores
        what = "GPUs" if records[0].backend == "cuda" else "cores"
        lines.append(
            f"oversubscribed: {' or '.join(map(str, crowds))} ranks share {cores} {what}, so "
            "ratios compare total work, not speed-up, and exposed waiting and overlap are n/a"
        )
    used = records[0].environment
    if used.device is not None:
        lines.append(f"on {used.device}; between GPUs: {used.route}")
    clusters = {record.forecast.cluster for record in records if record.forecast}
    if clusters:
        lines.append(
            f"simulated: not measured; the paper's size on {', '.join(clusters)}, with the best "
            "micro-batches there"
        )
    if scales and len({record.flops_per_token for record in records}) > 1:
        lines.append("the model grows with the ranks, so speed-up counts flops/s, not tokens/s")
    cuts_to_cache = any(r.stages and r.stages.cut_to_cache for r in records)
    for r in records:
        if r.searched:
            tried = ", ".join(
                f"{parse_plan(plan).micro_batches}: {tps:,.0f}" for plan, tps in r.searched.items()
            )
            lines.append(f"{r.role}: best of these micro_batches and their tps: {tried}")
        if r.idle_ranks:
            lines.append(told_idle(parse_plan(r.plan), r.idle_ranks))
        if r.forecast and r.forecast.idle_ranks:
            lines.append(
                f"simulated: {told_idle(parse_plan(r.forecast.plan), r.forecast.idle_ranks)}"
            )
        if r.sampled_rows is not None:
            lines.append(f"{r.plan}: {r.sampled_rows} sampled rows checked; the oracle is too long")
        if r.shared_memory:
            lines.append(f"{r.plan}: K/V read from shared memory inside the node")
        if not r.exact:
            lines.append(f"{r.role}: computes another model, so its error says how far that is off")
        if r.router_skew is not None:
            lines.append(f"{r.role}: gate skewed by --router-skew {r.router_skew:g}")
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
    """Return how layers lie on stages, and the working set of a chunk beside the cache."""
    counts = [last - first for first, last in use.layers]
    layers = f"{len(counts)} stages of {', '.join(map(str, counts))} layers"
    if len(set(counts)) == 1:
        layers = f"{len(counts)} stages, layers in each: {counts[0]}"
    cache = "unknown; --cache gives it"
    if use.cache_bytes is not None:
        cache = f"{use.cache_bytes / 1e6:,.2f} MB"
        if use.working_set_bytes > use.cache_bytes:
            cache += ", which it passes"
    return (
        f"{layers}; chunks of {use.chunk_rows:,} tokens, working set "
        f"{use.working_set_bytes / 1e6:,.2f} MB, cache {cache}"
    )


def _overlaps(overlap: Mapping[str, Overlap]) -> str:
    """Return how much of the time in flight was hidden, by axis, the longest first."""
    parts = []
    for axis, o in sorted(overlap.items(), key=lambda item: -item[1].in_flight):
        share = o.hidden / o.in_flight if o.in_flight else 0.0
        parts.append(f"{axis} {share:.0%} of {1e3 * o.in_flight:.3g} ms in flight hidden")
    return "; ".join(parts)


def _expert_lines(records: Sequence[Record]) -> list[str]:
    """Return how uneven the load of the experts was, and what was dropped."""
    uses = {r.role: r.experts for r in records if r.experts}
    if not uses:
        return []
    busiest = ", ".join(f"{role} {use.imbalance:.2f}" for role, use in uses.items())
    role, use = next(iter(uses.items()))
    number, rows = max(enumerate(use.rows, 1), key=lambda item: max(item[1]) / max(sum(item[1]), 1))
    shown = ", ".join(map(str, rows[:_MOST_EXPERTS])) + (", ..." if rows[_MOST_EXPERTS:] else "")
    lines = [
        f"experts: rows of the busiest over the mean, in the worst layer: {busiest}",
        f"experts: rows in that layer, number {number} of {len(use.rows)} ({role}): {shown}",
    ]
    if any(use.dropped for use in uses.values()):
        dropped = ", ".join(
            f"{role} {use.dropped:,} ({use.dropped_fraction:.1%})" for role, use in uses.items()
        )
        lines.append(f"experts: choices dropped for want of capacity: {dropped}")
    return lines
