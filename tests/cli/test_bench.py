"""The main job as a user starts it."""

from pathlib import Path

import msgspec
import pytest

from pympa.bench.experiment.description import Experiment
from pympa.bench.records.record import Record
from pympa.plan.comm_volume import comm_volume
from pympa.plan.mesh import parse_plan
from pympa.text.toml import parse_toml
from pympa.verify.contract import TOLERANCE
from support.experiments import TINY
from support.jobs import altered_job, run_job
from support.lanes import FULL, lanes


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def records(path: Path) -> list[Record]:
    return [msgspec.json.decode(line, type=Record) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("ranks", lanes([1, 2, 3, 5], [0, 2]))
def test_any_number_of_ranks(tiny, tmp_path, ranks):
    output = tmp_path / "r.jsonl"
    job = run_job(ranks, "-m", "pympa.bench", str(tiny), "--output", str(output))
    assert job.status == 0, job.err
    found = records(output)
    assert [r.role for r in found] == ["baseline", "proposed"]
    for r in found:
        assert r.verified
        assert r.error <= r.tolerance
        assert r.ranks == ranks == len(r.bytes_sent.by_rank)
        assert r.tps > 0
        assert abs(r.tps * r.tpot_ms / 1e3 - 1) < 1e-9
        assert sum(r.bytes_sent.by_rank) == sum(r.bytes_sent_by_axis.values())
        assert sum(r.bytes_sent.by_rank) == sum(r.bytes_received.by_rank)
        assert (r.comm_fraction is None) == r.oversubscribed
        assert r.clock == "measured"
        model = parse_toml(TINY.encode(), Experiment, "tiny").sizes["local"].model
        expected = comm_volume(
            model, parse_plan(r.plan), [32, 32], 4, shares_memory=r.shared_memory
        )
        assert (r.bytes_sent_by_axis, r.bytes_read_by_axis) == expected
        assert sum(r.bytes_read.by_rank) == sum(expected.read.values())
    assert found[1].plan == (f"cp={ranks}" if ranks > 1 else "tp=1")
    for word in ("published tps", "error / tolerance", "roofline"):
        assert any(word.split()[0] in line for line in job.out.splitlines())


def test_ragged_batch(tmp_path):
    path, output = tmp_path / "ragged.toml", tmp_path / "r.jsonl"
    text = TINY.replace("batch = 2", "batch = 3").replace("tokens = 32", "tokens = [5, 60, 1]")
    path.write_text(text)
    plans = [word for plan in ("dp=3", "cp=3", "pp=1,tp=3") for word in ("--plan", plan)]
    job = run_job(3, "-m", "pympa.bench", str(path), "--output", str(output), *plans)
    assert job.status == 0, job.err
    assert "3 sequences, 66 tokens" in job.out
    assert all(r.verified and (r.batch, r.tokens) == (3, 60) for r in records(output))


def test_more_tp_than_heads_is_refused(tmp_path):
    path = tmp_path / "few.toml"
    path.write_text(TINY.replace("heads = 4", "heads = 2"))
    job = run_job(4, "-m", "pympa.bench", str(path), "--plan", "tp=4", timeout=60)
    assert job.status == 2
    assert "tp=4: expected at most 2, the fewest heads of a layer" in job.err
    assert "cp=2,tp=2" in job.err
    assert job.err.count("pympa: ") == 1


@FULL
def test_options(tiny, tmp_path):
    output, text = tmp_path / "r.jsonl", tmp_path / "text"
    text.write_bytes(b"to be or not to be")
    job = run_job(
        4, "-m", "pympa.bench", str(tiny), "--plan", "cp=2,tp=2", "--plan", "dp=4", "--dtype",
        "float16", "--warmup", "0", "--iterations", "2", "--output", str(output), "--no-verify",
        "--input", str(text), "--threads", "2", "--isa", "portable", "--timeout", "60",
    )  # fmt: skip
    assert job.status == 0, job.err
    found = records(output)
    assert [r.plan for r in found] == ["cp=2,tp=2", "dp=4"]
    assert all(r.dtype == "float16" and not r.verified and r.error is None for r in found)
    assert all(r.step_seconds.iterations == 2 for r in found)
    assert found[0].environment.isa == "portable"
    assert "unverified" in job.out


@FULL
def test_the_arena_is_most_of_the_process(tmp_path):
    """What the arena does not know of: interpreter, libraries, MPI, host lists; no activations."""
    output = tmp_path / "r.jsonl"
    job = run_job(
        2, "-m", "pympa.bench", "ring-dense-fp16", "--plan", "cp=2", "--no-verify", "--output",
        str(output), "--iterations", "1",
    )  # fmt: skip
    assert job.status == 0, job.err
    (record,) = records(output)
    assert record.peak_bytes.max > 100e6
    beside = record.process_peak_bytes.max - record.peak_bytes.max
    assert 0 < beside < 150 * 2**20


def test_list_and_help():
    listed = run_job(2, "-m", "pympa.bench", "--list")
    assert listed.status == 0
    assert listed.out.count("ring-dense-fp16") == 3  # one row for each size, printed once
    assert "(ours)" in listed.out
    helped = run_job(2, "-m", "pympa.bench", "--help")
    assert helped.status == 0
    assert helped.out.count("--no-verify") == 2  # usage and description, printed once


@pytest.mark.parametrize(
    ("arguments", "says"),
    lanes(
        [
            (["ring-dens"], "did you mean 'ring-dense'?"),
            (["nowhere/x.toml"], "experiment nowhere/x.toml: No such file or directory"),
            (
                ["--plan", "cp=3"],
                "needs 3 ranks; this run has 4. nearest plans that work on 4 ranks: cp=4",
            ),
            (
                ["--plan", "tp=2,dim=2,dim_algo=halve"],
                "dim_algo: expected exchange, gather, reduce or",
            ),
            (["--plan", "cp"], "expected key=value, as in 'tp=8,pp=2'; got 'cp'"),
            (["--plan", "cp=4,cp=1"], "cp: expected once; got it twice"),
            (["--plan", "cp=0"], "cp: expected a number of at least 1; got '0'"),
            (
                ["--plan", f"cp=4,micro_batches={9**30}"],
                "micro_batches: expected a number of at most",
            ),
            (
                ["--plan", "cp=4,micro_batches=9999"],
                "micro_batches=9999: expected at most 2048, the tokens of the batch",
            ),
            (["--threads", "9" * 400], "expected a number of at most 1,024; got"),
            (["--cache", "9" * 400], "expected at least 1 byte"),
            (["--size", "huge"], "size: expected one of paper, local; got 'huge'"),
            (["--dtype", "int8"], "dtype: expected one of float32, float16, bfloat16; got 'int8'"),
            (["--iterations", "0"], "expected a number of at least 1; got '0'"),
            (["--isa", "sse9"], "isa: expected one of"),
            (["--input", "/nowhere"], "/nowhere"),
            (["--output", "/nowhere/r.jsonl"], "/nowhere/r.jsonl"),
            (["--size", "paper", "--plan", "cp=4"], "bytes"),
        ],
        [0, 2, 4, 11, 14, 16],
    ),
)
def test_bad_input_is_refused_once_and_soon(arguments, says):
    names = [] if arguments[0].startswith("ring") or "x.toml" in arguments[0] else ["ring-dense"]
    job = run_job(4, "-m", "pympa.bench", *names, *arguments, timeout=60)
    assert job.status != 0
    assert says in job.err
    assert job.err.count("pympa: ") == 1, job.err
    assert "Traceback" not in job.err
    assert job.seconds < 20


def test_paper_size_says_what_is_needed_and_present():
    job = run_job(
        2, "-m", "pympa.bench", "ring-dense", "--size", "paper", "--plan", "cp=2", "--plan", "tp=2"
    )
    assert job.status == 1
    assert "oracle" not in job.err
    assert "available" in job.err
    assert "on the largest rank" in job.err


def test_a_failed_verification_is_told_and_not_timed(tiny, tmp_path):
    output = tmp_path / "r.jsonl"
    job = run_job(
        2, *altered_job("wrong_sums"), str(tiny), "--output", str(output), "--plan", "tp=2",
        "--plan", "cp=2",
    )  # fmt: skip
    assert job.status == 1
    assert "plan tp=2 failed verification" in job.err
    assert [r.plan for r in records(output)] == ["cp=2"]


def test_a_batch_too_large_for_the_oracle_is_sampled(tiny, tmp_path):
    output = tmp_path / "r.jsonl"
    job = run_job(2, *altered_job("no_oracle"), str(tiny), "--output", str(output))
    assert job.status == 0, job.err
    assert job.out.count("sampled rows are checked") == 2
    for record in records(output):
        assert record.verified
        assert 1 < record.sampled_rows <= 32
        assert record.error <= record.tolerance == TOLERANCE["float32"]
        assert record.error_one_rank is None


SPARSE = TINY.replace(
    "mlp_hidden = 64", "mlp_hidden = 64, experts = 4, top_k = 2, capacity_factor = 1.0, "
    "capacity_group = 8"
).replace('family = "ring"', 'family = "ring-ep"')  # fmt: skip


@FULL
def test_experts(tmp_path):
    path, output = tmp_path / "sparse.toml", tmp_path / "r.jsonl"
    path.write_text(SPARSE)
    for options in ([], ["--router-skew", "3"]):
        job = run_job(
            4, "-m", "pympa.bench", str(path), "--output", str(output), "--resume", *options
        )
        assert job.status == 0, job.err
        assert "busiest expert over the mean" in job.out
        assert "dropped because of full capacity" in job.out
    found = records(output)
    # Which number of micro-batches is fastest may differ from run to run.
    assert [(r.role, parse_plan(r.plan).ep, r.router_skew) for r in found] == [
        ("baseline", 2, None), ("proposed", 4, None), ("baseline", 2, 3), ("proposed", 4, 3)
    ]  # fmt: skip
    for r in found:
        assert r.verified
        for rows in r.experts.rows:
            assert len(rows) == 4
        taken = sum(map(sum, r.experts.rows))
        assert taken + r.experts.dropped == 2 * 64 * 2, "layers x tokens x top_k"
        assert r.experts.dropped_fraction == r.experts.dropped / 256
        assert r.experts.imbalance == max(max(rows) * 4 / sum(rows) for rows in r.experts.rows)
    assert found[2].experts.dropped > found[0].experts.dropped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--router-skew", "1"], "tiny.toml"),
        (["--plan", "dp=2,ep=2"], "expected 1, because the model has no experts"),
    ],
)
def test_experts_that_are_not_there(tiny, options, message):
    job = run_job(2, "-m", "pympa.bench", str(tiny), *options, timeout=60)
    assert job.status == 2
    assert message in job.err
    assert job.err.count("pympa: ") == 1


def test_a_skew_that_is_no_number(tmp_path):
    path = tmp_path / "sparse.toml"
    path.write_text(SPARSE)
    job = run_job(2, "-m", "pympa.bench", str(path), "--router-skew", "nan", timeout=60)
    assert job.status == 2
    assert "router_skew: expected a finite number" in job.err


@FULL
def test_records_of_another_model_are_no_records_of_this_one(tiny, tmp_path):
    output = tmp_path / "r.jsonl"
    command = ("-m", "pympa.bench", str(tiny), "--plan", "cp=2", "--cluster", "none")

    def run(*options):
        return run_job(2, *command, "--output", str(output), *options, timeout=60)

    assert run().status == 0
    assert "verified" not in run("--resume").err
    tiny.write_text(tiny.read_text().replace("mlp_hidden = 64", "mlp_hidden = 48"))
    assert "verified" in run("--resume").err
    assert len({record.job for record in records(output)}) == 2
    whole = output.read_bytes()
    output.write_bytes(whole[:-1])  # a record that lacks its newline is one
    assert "verified" not in run("--resume").err
    assert output.read_bytes() == whole
    output.write_bytes(whole[:-9])
    refused = run()
    assert refused.status == 2
    assert "the last line is cut short; use --resume" in refused.err


@pytest.mark.parametrize("option", ["--output", "--trace"])
def test_what_the_job_reads_is_not_written_over(tiny, option):
    text = tiny.read_bytes()
    job = run_job(2, "-m", "pympa.bench", str(tiny), option, str(tiny), timeout=60)
    assert job.status == 2
    assert "expected another file; this job reads that one" in job.err
    assert tiny.read_bytes() == text
