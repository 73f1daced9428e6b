"""What footprint prints is what a rehearsal needs, and what a paper prints stands beside it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pympa.bench.experiment.description import load_experiment
from pympa.bench.report.published_figures import Figure, compare_figures
from pympa.footprint.rehearsal import Rehearsal, rehearse
from pympa.footprint.survey import layer_parameters, survey
from pympa.footprint.working_set import working_sets
from pympa.plan.accounting import parameters
from pympa.plan.mesh import parse_plan
from pympa.plan.partition import stage_bounds
from pympa.spec import DTYPES
from support import worlds
from support.jobs import ROOT
from support.lanes import lanes

KIND = DTYPES["bfloat16"]
LENGTHS = (70, 300, 9, 70, 70)

MODEL = """
d_model = 64
vocabulary = 256
[[layers]]
repeat = 3
heads = 4
head_dim = 16
mlp_hidden = 128
"""


def rehearsal_of(spec, plan, stages=None):
    return lambda rank: Rehearsal(spec, plan, rank, KIND, isa=worlds.ISA, stages=stages)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (worlds.DENSE, "tp=1"),
        (worlds.DENSE, "tp=4,pp=2,micro_batches=3"),
        (worlds.DENSE, "pp=4,dp=2,micro_batches=9"),
        (worlds.DENSE, "cp=3,pp=2,micro_batches=30"),
        (worlds.DENSE, "cp=4,ulysses=2"),
        (worlds.DENSE, "tp=2,dim=2"),
        (worlds.SLIDING, "cp=4,micro_batches=9"),
        (worlds.ODD, "tp=2,dp=3"),
        (worlds.EXPERTS, "tp=2,cp=2,ep=2"),
        (worlds.EXPERTS, "tp=4,ep=2,etp=2"),
        (worlds.ODD_EXPERTS, "pp=3,dp=2,ep=2"),
        (worlds.ODD_EXPERTS, "dp=4,ep=4,micro_batches=2"),
        (worlds.SANDWICH, "cp=2,tp=2"),
        (worlds.POST_AND_PARALLEL, "tp=2,dim=2"),
        (worlds.LATENT, "tp=2,dp=2,ep=2"),
        (worlds.SINKS, "pp=3,cp=2,ep=2,micro_batches=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rank_needs_what_its_rehearsal_needs(spec, text):
    """The uses of a rank add up to the peak of its arena, byte for byte."""
    plan = parse_plan(text)
    found = survey(spec, plan, LENGTHS, rehearsal_of(spec, plan))
    assert [need.total_bytes for need in found.ranks] == [
        rehearse(spec, plan, rank, LENGTHS, KIND, isa=worlds.ISA) for rank in range(plan.world)
    ]
    assert len(found.layers) == len(spec.blocks)
    for need in found.layers:
        rank = found.ranks[need.stage * plan.stage_ranks]
        assert need.total_bytes <= max(r.total_bytes for r in found.ranks)
        assert need.working_set.total <= max(r.working_set.total for r in found.ranks)
        assert rank.uses["weights"] > 0


def test_parameters():
    """Ranks of tp, dim, pp, ep and etp together hold the model once, but for small vectors."""
    spec = worlds.ODD_EXPERTS
    alone = survey(spec, parse_plan("tp=1"), LENGTHS, rehearsal_of(spec, parse_plan("tp=1")))
    layers = sum(layer_parameters(spec, index) for index in range(len(spec.blocks)))
    tables = 2 * spec.vocabulary * spec.d_model
    final_norm = spec.d_model * 2
    assert alone.ranks[0].parameters == layers + tables + final_norm
    assert parameters(spec) < alone.ranks[0].parameters < 1.05 * parameters(spec)
    assert [need.parameters for need in alone.layers] == [
        layer_parameters(spec, index) for index in range(len(spec.blocks))
    ]
    plan = parse_plan("pp=3")
    staged = survey(spec, plan, LENGTHS, rehearsal_of(spec, plan))
    assert sum(need.parameters for need in staged.ranks) == alone.ranks[0].parameters


def test_the_papers_figures_are_not_bent():
    experiment = load_experiment("stages")
    paper, plan = experiment.sizes["paper"], parse_plan("pp=4,dp=4")
    stages = stage_bounds(paper.model, plan, 10000, itemsize=2)
    measure = working_sets(rehearsal_of(paper.model, plan, stages)(0))
    figures = {
        figure.name: figure
        for figure in compare_figures(
            experiment.published_footprint, paper.model, paper.lengths, 2, measure
        )
    }
    assert figures["parameters"].printed == 30e9
    assert figures["parameters"].given == 4 * (4 * 16384 * 4096 + 2 * 16384**2) + 2 * 256 * 16384
    assert figures["parameters"].verdict == "9.29 × computed"
    assert figures["weights of a layer"].given == 2 * (4 * 16384 * 4096 + 2 * 16384**2)
    assert figures["activations"].verdict == "agrees in GiB"
    assert figures["chunk of 64 tokens"].given == 128 * 64 * 16384 * 2
    assert figures["chunk of 64 tokens"].verdict == "0.0447 × computed"
    assert figures["weight tile"].given == 512 * (16384 + 16384) * 2  # before and after the hidden
    assert figures["weight tile"].verdict == "agrees in MiB"
    assert figures["cache in use"].given == 50e6


@pytest.mark.parametrize(
    ("printed", "given", "is_bytes", "verdict"),
    [
        (1.0, 1.005, True, "agrees"),
        (2e9, 2 * 2**30, True, "agrees in GiB"),
        (2e9, 2 * 2**30, False, "0.931 × computed"),
        (3e6, 3 * 2**20, True, "agrees in MiB"),
        (3e6, 3e6 * 1.073, True, "0.932 × computed"),
    ],
)
def test_verdicts(printed, given, is_bytes, verdict):
    assert Figure("x", printed, given, "", is_bytes).verdict == verdict


def footprint(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pympa", "footprint", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )


def test_from_the_console():
    job = footprint("stages", "--plan", "pp=4,tp=2,dp=2", "--micro-batches", 8, "--cache", "2MiB")
    assert job.returncode == 0, job.stderr
    out = " ".join(job.stdout.split())
    assert "tp=2,pp=4,dp=2,micro_batches=8, " in out
    rows = re.findall(r"^  (\d[\d,-]*) +[\d,]+ ", job.stdout, re.M)
    assert "4-11" in rows, "ranks of the two stages between, which need the same"
    assert "the cache of a rank has 2.10 MB" in out
    assert "layers of each stage: 1, 1, 1, 1" in out
    for words in (
        "printed in seed 003, paper size",
        "30,000,000,000 3,229,614,080",
        "15.00 GB 1.61 GB",
        "39.06 GB 41.94 GB",
        "12.00 MB 268.44 MB",
    ):
        assert words in out
    assert "printed" not in footprint("experts", "--plan", "dp=2,ep=2").stdout


def test_a_model_alone(tmp_path: Path):
    path = tmp_path / "model.toml"
    path.write_text(MODEL)
    job = footprint(path, "--plan", "dp=2", "--dtype", "float32", "--batch", 2, "--tokens", 100)
    assert job.returncode == 0, job.stderr
    assert "2 × 100 tokens, float32, dp=2" in " ".join(job.stdout.split())
    assert "0-1" in job.stdout
    assert "0-2" in job.stdout


def test_without_mpi(tmp_path: Path):
    """Not even its library is loaded."""
    code = (
        "import sys\n"
        "from pympa.cli.footprint import main\n"
        "status = main(['stages', '--plan', 'tp=2,pp=2'])\n"
        "sys.exit(status or any(name.startswith('mpi4py') for name in sys.modules))\n"
    )
    job = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert job.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    lanes(
        [
            ([], "expected a model and a plan, as in: pympa footprint stages --plan tp=8,pp=2"),
            (["stages"], "expected a model and a plan"),
            (["stagse", "--plan", "tp=2"], "did you mean 'stages'?"),
            (["/nowhere/x.toml", "--plan", "tp=2"], "No such file or directory"),
            (["stages", "--plan", "tp"], "expected key=value"),
            (["stages", "--plan", "pp=8"], "pp=8: expected at most 4"),
            (["stages", "--plan", "tp=2", "--size", "huge"], "size: expected one of paper, local"),
            (["stages", "--plan", "tp=2", "--dtype", "int8"], "expected one of float32"),
            (
                ["stages", "--plan", "tp=2", "--cache", "lots"],
                "as in 65536, 50MB or 2MiB; got 'lots'",
            ),
            (["stages", "--plan", "tp=2", "--isa", "sse9"], "isa: expected one of"),
            (["stages", "--plan", "pp=2", "--weight-limit", "1kB"], "got 1,000; raise the limit"),
            (["stages", "--plan", "tp=2", "--micro-batches", "0"], "at least 1; got '0'"),
        ],
        [0, 4],
    ),
)
def test_bad_input(arguments, says):
    job = footprint(*arguments)
    assert job.returncode == 2
    assert says in job.stderr
    assert job.stderr.count("pympa: ") == 1
    assert "Traceback" not in job.stderr


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    lanes(
        [
            (MODEL, [], "--dtype: expected a dtype, because the file describes only a model"),
            (MODEL.replace("heads", "haeds"), ["--dtype", "float32"], "did you mean `heads`?"),
            ("d_model = ", [], "model.toml: "),
            ("", [], "the file is empty"),
            ("[published_footprint]\nparametres = 1.0", [], "model.toml: "),
        ],
        [0],
    ),
)
def test_broken_models(tmp_path: Path, text, arguments, says):
    path = tmp_path / "model.toml"
    path.write_text(text)
    job = footprint(path, "--plan", "tp=2", *arguments)
    assert job.returncode == 2
    assert says in job.stderr
    assert "Traceback" not in job.stderr
