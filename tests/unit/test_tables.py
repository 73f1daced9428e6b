"""No number is lost on a narrow terminal, and names are shown, never obeyed."""

import re
from collections import Counter

import msgspec
import pytest

from pympa.bench.experiment.description import load_experiment, packaged_experiments
from pympa.bench.kernels.table import KernelRecord, Seconds
from pympa.bench.kernels.table import result_table as kernel_result_table
from pympa.bench.records.compare import compare, comparison_table
from pympa.bench.records.record import ExpertUse, Forecast, StageUse, by_rank, spread
from pympa.bench.report.published_figures import Figure
from pympa.bench.report.table import experiment_list, result_table
from pympa.bench.simulate.report import simulated_table
from pympa.bench.simulate.rows import simulated_row
from pympa.calibrate.profile import error_table
from pympa.cli.footprint_table import figure_table, layer_table, rank_table, working_set_table
from pympa.costs.cluster import load_cluster
from pympa.costs.curves import Curve
from pympa.footprint.survey import LayerNeed, Need, Survey
from pympa.footprint.working_set import WorkingSet
from pympa.plan.mesh import parse_plan
from pympa.plan.rules import idle_ranks
from pympa.sim.predict import predict
from pympa.text.escape import shown
from pympa.text.table import Table
from support.records import make_record

WIDTHS = (40, 60, 80, 100, 200)
NUMBER = re.compile(r"\d[\d,.]*(?:e[+-]\d+)?%?")
LONG_PLAN = "pp=2,dp=2,cp=2,tp=2,ep=4,micro_batches=128,balance=contiguous,dim_algo=gather"


def big_record(**changes):
    record = make_record(
        plan=LONG_PLAN, ranks=1024, tps=1_234_567_890.0, tpot_ms=8.1e-7, dtype="bfloat16",
        step_seconds=spread([0.08, 0.09, 0.1]), performed_flops=12.34, flops_per_token=1e12,
        bytes_sent=by_rank([1e12] * 16), peak_bytes=by_rank([81_234_567_890]),
        roofline_fraction=1.234, error=5.4e-3, tolerance=8e-3, published_tps=1_450_000_000.0,
        forecast=Forecast("c", "tp=16", 987_654_321.0, False, 12), joules_per_token=1.23e-4,
        searched={"tp=2": 123_456_789.0}, idle_ranks=1000, sampled_rows=63,
        stages=StageUse([(0, 5000), (5000, 9999)], 1_048_576, 9_876_543_210, 2_097_152, True),
        experts=ExpertUse([[123_456_789, 987_654_321]], 1.78, 77_777_777, 0.07),
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)


def measured():
    rows = [
        [big_record(role=role, tps=tps, repeat=n) for n, tps in enumerate((1.1e9, 1.3e9, 1.2e9))]
        for role in ("baseline", "proposed")
    ]
    return result_table("ring-dense (paper: 128 × 100,000 tokens, bfloat16)", rows, ["a note of 7"])


def test_the_table_says_why_hosts_do_not_use_their_best():
    record = big_record(role="baseline")
    note = "avx512 on all hosts: a would use amx_bf16, which b lacks"
    noted = msgspec.structs.replace(record.environment, isa="avx512", isa_note=note)
    mixed = msgspec.structs.replace(record, environment=noted)
    assert f"instruction set: {note}" in result_table("", [[mixed]]).caption
    assert "all hosts" not in result_table("", [[record]]).caption


def footprint(which):
    working_set = WorkingSet(123_456_789_012, 234_567_890_123, 345_678_901_234, 456_789_012_345)
    uses = {"weights": 81_234_567_890, "activations": 12_345_678_901, "messages": 7_654_321_098}
    numbers = [405_123_456_789 + n for n in range(3)]
    ranks = tuple(Need(n, Counter(uses), working_set) for n in numbers)
    layers = tuple(LayerNeed(n, Counter(uses), working_set, 0) for n in numbers)
    found = Survey(ranks, layers, 1_048_576)
    return {
        "ranks": lambda: rank_table("stages: 128 × 10,000 tokens", found, 50_000_000),
        "layers": lambda: layer_table(found),
        "working sets": lambda: working_set_table(found, [1_048_576]),
    }[which]()


def kernels():
    record = KernelRecord(
        kernel="attention", dtype="bfloat16", head_dim=128, causal=True, tokens=131_072,
        shape="131072x131072x32/8", threads=64, seconds=Seconds(1.0, 1.0, 1.0), gflops=12_345.6,
        gbytes_per_second=3_456.7, peak_fraction=0.876, torch_ratio=12.34, error=1.2e-3,
        verified=True, isa="avx2", iterations=7, tolerance=8e-3, checked_rows=64,
    )  # fmt: skip
    return kernel_result_table("bfloat16, roofline: 9,876 GFLOP/s", [(record, "compute")] * 2)


def simulated():
    cluster, experiment = load_cluster("dgx-h100x2"), load_experiment("ring-dense")
    rows = []
    for planned in experiment.plans:
        row = simulated_row(planned, experiment.sizes["local"], "bfloat16", cluster, None)
        spec, lengths = row.size.model, row.size.lengths
        found = predict(spec, lengths, row.plan, "bfloat16", cluster, stages=row.stages)
        rows.append((row, found))
    return simulated_table("ring-dense", "bfloat16", cluster, rows, ["a note of 7"])


def compared():
    return comparison_table(compare([big_record()], [big_record(tps=2.345e9)]))


TABLES = {
    "measured": measured,
    "experiments": lambda: experiment_list(
        {name: load_experiment(name) for name in packaged_experiments()}
    ),
    "footprint of ranks": lambda: footprint("ranks"),
    "footprint of layers": lambda: footprint("layers"),
    "working sets": lambda: footprint("working sets"),
    "printed figures": lambda: figure_table(
        "t", [Figure("weights of a layer", 30e9, 3_229_614_080, "parameters × bytes of each")]
    ),
    "kernels": kernels,
    "simulated": simulated,
    "compared": compared,
    "fit": lambda: error_table(
        (Curve(kernel="linear_accumulate", dtype="bfloat16", ranks=128, sizes=((1.0, 2.0, 4.0),),
               seconds=(1.0, 2.0, 4.0), error=0.123, worst=1.234),), None),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_number_is_there_at_every_width(name):
    table = TABLES[name]()
    whole = "\n".join(table.lines(10_000))
    numbers = set(NUMBER.findall(whole))
    assert len(numbers) >= 3
    for width in WIDTHS:
        lines = [line.rstrip() for line in table.lines(width)]
        text = "\n".join(lines)
        assert numbers <= set(NUMBER.findall(text)), width
        assert "…" not in text
        for line in lines:
            assert len(line) <= width or " " not in line.strip(), f"{width}: {line!r}"


def test_a_column_that_does_not_fit_makes_a_second_table():
    table = Table("title", ["caption"])
    table.add_column("plan", text=True)
    for heading in ("tps", "MB sent", "peak MB\nper rank"):
        table.add_column(heading)
    table.add_row(["cp=2", "proposed"], "1,234,567", "12.5", "99.0")
    wide = [line.rstrip() for line in table.lines(60)]
    assert wide == [
        "title", "",
        "                                    peak MB",
        "  plan             tps   MB sent   per rank",
        " ───────────────────────────────────────────",
        "  cp=2       1,234,567      12.5       99.0",
        "  proposed",
        "", "caption",
    ]  # fmt: skip
    narrow = [line.rstrip() for line in table.lines(27)]
    assert narrow == [
        "title", "",
        "  plan             tps",
        " ──────────────────────",
        "  cp=2       1,234,567",
        "  proposed",
        "",
        "                     peak",
        "                       MB",
        "                MB    per",
        "  plan        sent   rank",
        " ─────────────────────────",
        "  cp=2        12.5   99.0",
        "  proposed",
        "", "caption",
    ]  # fmt: skip
    blocks = [line.rstrip() for line in table.lines(14)]
    assert blocks[1:] == [
        "", "plan: cp=2", "    proposed", "  tps:", "    1,234,567", "  MB sent:", "    12.5",
        "  peak MB per", "    rank: 99.0", "", "caption",
    ]  # fmt: skip


NASTY = "\x1b[31m[red]\n:smile:\x07\u202e"


def test_names_are_shown_as_they_are():
    """Titles, roles and experiments' names come from files."""
    safe = r"\x1b[31m[red]\n:smile:\x07\u202e"
    assert shown(NASTY) == safe
    assert shown("x" * 10**6).endswith("(996,000 characters more)")
    table = result_table(NASTY, [[make_record(role=NASTY)]], [NASTY])
    for width in (40, 200):
        text = "\n".join(table.lines(width))
        assert text.count(safe) >= 3
        assert text.replace("\n", "").isprintable()
    experiment = msgspec.structs.replace(load_experiment("ring-dense"), title=NASTY, dtype=NASTY)
    text = "\n".join(experiment_list({NASTY: experiment}).lines(176))
    assert text.count(safe) >= 3


def test_ranks_without_tokens_are_told_below_the_table():
    table = result_table("t", [[big_record()]])
    assert "1,000 of" in table.caption
    assert "simulated: tp=16: 12 of 16 ranks hold no tokens" in table.caption


def test_ranks_without_tokens_are_counted():
    assert idle_ranks(parse_plan("dp=16"), [100]) == 15
    assert idle_ranks(parse_plan("dp=2,tp=2"), [100]) == 2
    assert idle_ranks(parse_plan("cp=8"), [3]) == 5
    assert idle_ranks(parse_plan("dp=2,cp=2"), [5, 5]) == 0
