"""Stages as a user runs them: chunks cut to a cache, rows on fewer ranks than the job has."""

import re
from pathlib import Path

import pytest

from pympa.bench.experiment.description import load_experiment, packaged_experiments
from pympa.bench.records.file import RecordFile
from pympa.bench.records.record import Record
from pympa.plan.mesh import parse_plan
from support.experiments import TINY
from support.jobs import ROOT, Finished, altered_job, run_job
from support.lanes import FULL, lanes

STAGED = TINY.replace('family = "ring"', 'family = "stages"').replace("repeat = 2", "repeat = 3")
SCALING = (
    TINY.partition("[[plans]]")[0]
    + """
[[plans]]
role = "two"
family = "stages"
ranks = 2
published_tps = 100
[[plans]]
role = "grown"
family = "stages-tp"
ranks = 4
grow = 2
published_tps = 150
[[plans]]
role = "eight"
family = "stages"
ranks = 8
"""
)


def bench(ranks: int, *arguments: object) -> Finished:
    return run_job(ranks, "-m", "pympa.bench", *map(str, arguments), timeout=90)


def write(folder: Path, text: str) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def by_role(path: Path) -> dict[str, Record]:
    return {record.role: record for record in RecordFile.load(str(path))}


def test_chunks_are_cut_to_the_cache(tmp_path):
    path, output = write(tmp_path, STAGED), tmp_path / "r.jsonl"
    job = bench(3, path, "--cache", "400kB", "--output", output)
    assert job.status == 0, job.err
    small = by_role(output)["proposed"].stages
    assert small is not None
    assert (small.cache_bytes, small.cut_to_cache) == (400_000, True)
    assert small.working_set_bytes <= 400_000
    assert small.layers == [(0, 1), (1, 2), (2, 3)]
    assert 1 <= small.chunk_rows < 64
    assert f"chunks of {small.chunk_rows} tokens, working set" in job.out
    assert "cache 0.40 MB" in job.out
    plan = parse_plan(by_role(output)["proposed"].plan)
    assert plan.micro_batches >= 64 / small.chunk_rows
    # With another cache the row is another measurement, and the baseline is not.
    again = bench(3, path, "--cache", "1GB", "--output", output, "--resume")
    assert again.status == 0, again.err
    found = RecordFile.load(str(output))
    assert [r.role for r in found] == ["baseline", "proposed", "proposed"]
    assert found[2].stages is not None
    assert found[2].stages.cache_bytes == 10**9
    assert found[2].stages.chunk_rows >= small.chunk_rows
    third = bench(3, path, "--cache", "1GB", "--output", output, "--resume")
    assert third.status == 0
    assert len(RecordFile.load(str(output))) == 3


@FULL
def test_a_cache_too_small_for_one_token(tmp_path):
    """One token at a time is the best that can be done, and the caption says it is not enough."""
    job = bench(3, write(tmp_path, STAGED.replace("tokens = 32", "tokens = 6")), "--cache", "100")
    assert job.status == 0, job.err
    assert "chunks of 1 tokens" in job.out
    assert "smaller than the working set" in job.out


@FULL
def test_rows_on_fewer_ranks_than_the_job_has(tmp_path):
    path, output = write(tmp_path, SCALING), tmp_path / "r.jsonl"
    job = bench(4, path, "--output", output, "--trace", tmp_path / "trace.json")
    assert job.status == 0, job.err
    assert "left out: rows need 8 ranks; this job has 4" in job.out
    assert "speed-up" in job.out
    assert "the model grows with the ranks" in job.out
    found = by_role(output)
    assert set(found) == {"two", "grown"}
    for role, ranks in (("two", 2), ("grown", 4)):
        r = found[role]
        assert r.ranks == ranks
        assert r.verified
        assert r.error <= r.tolerance
        for lists in (
            r.compute_seconds, r.comm_seconds, r.bytes_sent, r.bytes_received, r.peak_bytes,
            r.process_peak_bytes, r.hidden_seconds,
        ):  # fmt: skip
            assert len(lists.by_rank) == ranks
        assert r.oversubscribed == (ranks > r.environment.cores)
        assert (r.comm_fraction is None) == r.oversubscribed
    assert found["grown"].flops_per_token > 1.9 * found["two"].flops_per_token
    assert found["grown"].size == "local, 2 × the layers"
    assert parse_plan(found["grown"].plan).pp == 4
    resumed = bench(4, path, "--output", output, "--resume")
    assert resumed.status == 0
    assert len(RecordFile.load(str(output))) == 2, "all measured before"
    assert "1.50" in resumed.out, "published: the smallest row is what others are compared with"


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("failing", lanes([0, 1], [1]))
def test_a_rank_that_fails_while_others_rest(tmp_path, failing):
    path = write(tmp_path, SCALING)
    start = altered_job(f"failing_rank={failing}")
    job = run_job(4, *start, str(path), "--no-verify", timeout=60)
    assert job.status != 0
    assert f"pympa: rank {failing}: OSError: the disk is on fire" in job.err
    assert job.err.count("pympa: ") == 1, job.err
    assert job.seconds < 30


@pytest.mark.parametrize(
    ("text", "ranks", "arguments", "says"),
    lanes(
        [
            (
                STAGED,
                2,
                ["--cache", "much"],
                "expected at least 1 byte, as in 65536, 50MB or 2MiB",
            ),
            (STAGED, 2, ["--cache", "0"], "got '0'"),
            (STAGED, 2, ["--weight-limit", "1kB", "--plan", "pp=2"], "got 1,000; raise the limit"),
            (SCALING, 1, [], "rows need 2, 4, 8 ranks; this job has 1: use mpirun -n 8"),
            (
                SCALING.replace("ranks = 2", "ranks = 0"),
                2,
                [],
                "ranks and grow: expected at least 1; got 0",
            ),
            (SCALING.replace("grow = 2", "grow = 0"), 2, [], "at least 1; got 4 and 0"),
            (SCALING.replace("grow", "grwo"), 2, [], "did you mean `grow`?"),
        ],
        [0, 3, 6],
    ),
)
def test_bad_input(tmp_path, text, ranks, arguments, says):
    job = bench(ranks, write(tmp_path, text), *arguments)
    assert job.status == 2
    assert says in job.err
    assert job.err.count("pympa: ") == 1, job.err
    assert "Traceback" not in job.err


@FULL
def test_a_limit_on_weights_moves_the_cut(tmp_path):
    """A stage with the embedding holds fewer layers where bytes are short."""
    text = STAGED.replace("vocabulary = 256", "vocabulary = 1024")
    path, output = write(tmp_path, text.replace("repeat = 3", "repeat = 5")), tmp_path / "r.jsonl"
    # a layer: 4·32·32 + 2·32·64 elements of 4 bytes; embedding and head: 1024·32 each
    limit = 4 * (1024 * 32 + 8192)
    for options in ([], ["--weight-limit", limit]):
        job = bench(3, path, "--plan", "pp=3", "--output", output, *options)
        assert job.status == 0, job.err
    free, limited = (r.stages.layers for r in RecordFile.load(str(output)))
    assert free == [(0, 2), (2, 4), (4, 5)]
    assert limited == [(0, 1), (1, 4), (4, 5)]


def test_the_array_script_names_every_experiment():
    script = (ROOT / "bench" / "slurm" / "array.sbatch").read_text()
    (listed,) = re.findall(r"experiments=\(\n(.*?)\)", script, re.S)
    assert sorted(listed.split()) == packaged_experiments()
    assert f"--array=0-{len(listed.split()) - 1}\n" in script


@pytest.mark.parametrize("name", ["stages", "stages-strong", "stages-weak"])
def test_local_is_paper_in_proportion(name):
    experiment = load_experiment(name)
    paper, local = (experiment.sizes[size].model.blocks[0] for size in ("paper", "local"))
    widths = [experiment.sizes[size].model.d_model for size in ("paper", "local")]
    assert paper.heads * paper.head_dim * widths[1] == local.heads * local.head_dim * widths[0]
    assert paper.mlp_hidden * widths[1] == local.mlp_hidden * widths[0]
