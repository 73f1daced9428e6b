"""The kernel benchmark: its records, what it refuses, its formulas, and that its peers agree."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from pympa.bench.kernels import __main__ as kernels
from pympa.bench.kernels import cases as kernel_cases
from pympa.bench.kernels.cases.workbench import Workbench
from pympa.kernels.cpu import CpuKernels, supported_isas
from pympa.kernels.peaks import Machine
from pympa.spec import DTYPES
from pympa.verify.contract import TOLERANCE
from support.jobs import ROOT

FIELDS = {
    *("schema", "kernel", "dtype", "head_dim", "causal", "tokens", "shape", "threads", "seconds"),
    *("gflops", "gbytes_per_second", "peak_fraction", "torch_ratio", "error", "verified"),
    *("isa", "iterations", "tolerance", "checked_rows"),
}
TINY = {
    "linear": partial(kernel_cases.linear_case, m=3, n=5, k=7),
    "mlp": partial(kernel_cases.mlp_case, rows=3, width=8, hidden=20, gated=False),
    "gated_mlp": partial(kernel_cases.mlp_case, rows=3, width=8, hidden=20, gated=True),
    "even_moe": partial(
        kernel_cases.moe_case, rows=9, width=8, hidden=20, experts=4, top_k=2, skewed=False
    ),
    "skewed_moe": partial(
        kernel_cases.moe_case, rows=9, width=8, hidden=20, experts=4, top_k=2, skewed=True
    ),
    "full": partial(
        kernel_cases.attention_case, queries=9, keys=9, heads=2, head_dim=8, causal=False
    ),
    "causal": partial(
        kernel_cases.attention_case, queries=9, keys=9, heads=2, head_dim=8, causal=True
    ),
    "decode": partial(
        kernel_cases.attention_case, queries=1, keys=9, heads=2, head_dim=8, causal=True
    ),
    "grouped_decode": partial(
        kernel_cases.attention_case,
        queries=1,
        keys=9,
        heads=6,
        head_dim=8,
        causal=True,
        kv_heads=2,
    ),
    "rms_norm": partial(kernel_cases.norm_case, rows=4, columns=33, kind="rms"),
    "layer_norm": partial(kernel_cases.norm_case, rows=4, columns=33, kind="layer"),
    "rope": partial(kernel_cases.rope_case, rows=20, heads=3, head_dim=8),
}


def workbench(dtype="float32", torch=None):
    return Workbench(dtype, supported_isas()[0], 1, torch)


def use_tiny(monkeypatch):
    """Let the command line run the tiny cases only, without waiting for the peaks."""
    monkeypatch.setattr(kernels, "CASES", {name: [make] for name, make in TINY.items()})
    cores = Machine(flops_per_second=1e11, bytes_per_second=1e10)
    monkeypatch.setattr(kernels, "measure_cores", lambda *_: cores)


def test_as_a_user_starts_it(tmp_path):
    output = tmp_path / "r.jsonl"
    arguments = ["--dtype", "float32", "--kernel", "norm", "--iterations", "2", "--output"]
    job = subprocess.run(
        [sys.executable, "-m", "pympa.bench.kernels", *arguments, str(output)],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["kernel"] for r in records] == ["rms_norm", "layer_norm"]
    for r in records:
        assert set(r) == FIELDS
        assert r["verified"] is True
        assert r["error"] <= r["tolerance"] == TOLERANCE["float32"]
        assert (r["head_dim"], r["causal"], r["torch_ratio"]) == (None, None, None)
        assert (r["checked_rows"], r["iterations"], r["threads"]) == (16, 2, 1)
        assert 0 < r["seconds"]["min"] <= r["seconds"]["median"] <= r["seconds"]["max"]
        moved = 4 * (2 * 8192 * 4096 + (1 if r["kernel"] == "rms_norm" else 2) * 4096)
        assert r["gbytes_per_second"] * r["seconds"]["median"] * 1e9 == pytest.approx(moved)
        assert r["peak_fraction"] > 0
    assert all(len(line.rstrip()) <= 125 for line in job.stdout.splitlines())
    assert job.stdout.count("8192 × 4096") == 2


def test_every_case_has_a_row_and_a_record(tmp_path, monkeypatch, capsys):
    use_tiny(monkeypatch)
    output = tmp_path / "r.jsonl"
    for _ in range(2):  # the second run appends
        assert kernels.main(["--iterations", "1", "--output", str(output)]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 2 * len(DTYPES) * len(TINY)
    assert {r["dtype"] for r in records} == set(DTYPES)
    assert {r["causal"] for r in records if r["kernel"] == "attention"} == {False, True}
    assert capsys.readouterr().out.count("9 × 9 × 2") == 2 * len(DTYPES) * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dtype", "int8"], "int8"),
        (["--kernel", "conv"], "conv"),
        (["--isa", "sse9"], "sse9"),
        (["--against", "jax"], "jax"),
        (["--threads", "0"], "expected a number of at least 1; got '0'"),
        (["--iterations", "many"], "got 'many'"),
        (["--wrong"], "--wrong"),
        (["--output", "/nowhere/r.jsonl"], "/nowhere/r.jsonl"),
        (["--output", "/"], "/"),
        (["--against", "torch"], "pip install 'pympa[peers]'"),
    ],
)
def test_a_bad_request_is_refused_in_one_line(arguments, says, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    assert kernels.main(arguments) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("wrong", [0.0, np.nan])
def test_a_wrong_kernel_is_not_timed(wrong, monkeypatch, capsys):
    use_tiny(monkeypatch)

    def norm(self, x, weight, bias, out, **options):
        out.fill(wrong)

    monkeypatch.setattr(CpuKernels, "norm", norm)
    monkeypatch.setattr(kernels, "alternate", lambda *_: pytest.fail("timed"))
    assert kernels.main(["--dtype", "float16", "--kernel", "rms_norm"]) == 1
    *_, message = capsys.readouterr().err.splitlines()
    assert message.startswith("pympa: rms_norm float16 4x33: relative error: expected at most")


@pytest.mark.parametrize("dtype", DTYPES)
def test_flops_and_bytes(dtype):
    size = DTYPES[dtype].itemsize
    area = int(np.tril(np.ones((9, 9))).sum())  # pairs that see each other
    moe_flops = 9 * 2 * 2 * 2 * 8 * 20 + 2 * 9 * 8 * 4
    moe_bytes = size * (9 * 8 + 4 * (2 * 8 * 20 + 8 + 1) + 9 * 8)
    expected = {
        "linear": (2 * 3 * 5 * 7, size * (3 * 7 + 5 * 7 + 3 * 5)),
        "mlp": (2 * 2 * 3 * 8 * 20, size * (3 * 8 + 2 * 8 * 20 + 3 * 8)),
        "gated_mlp": (3 * 2 * 3 * 8 * 20, size * (3 * 8 + 3 * 8 * 20 + 3 * 8)),
        "even_moe": (moe_flops, moe_bytes),
        "skewed_moe": (moe_flops, moe_bytes),
        "full": (2 * 2 * 81 * 2 * 8, size * 4 * 9 * 2 * 8),
        "causal": (2 * 2 * area * 2 * 8, size * 4 * 9 * 2 * 8),
        "decode": (2 * 2 * 9 * 2 * 8, size * (2 + 2 * 9) * 2 * 8),
        "grouped_decode": (4 * 9 * 6 * 8, size * 2 * (6 + 9 * 2) * 8),
        "rms_norm": (4 * 4 * 33, size * (2 * 4 * 33 + 33)),
        "layer_norm": (7 * 4 * 33, size * (2 * 4 * 33 + 2 * 33)),
        "rope": (3 * 20 * 3 * 8, size * 2 * 20 * 3 * 8 + 4 * 20 * 8),
    }
    for name, make in TINY.items():
        case = make(workbench(dtype))
        assert (case.flops, case.bytes) == expected[name], name


def test_roofline_bound():
    cores = Machine(flops_per_second=100.0, bytes_per_second=10.0)
    case = TINY["linear"](workbench())
    assert kernels.least_seconds(case, cores) == (210 / 100, 4 * 71 / 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_the_peer_computes_the_same(name, dtype):
    torch = pytest.importorskip("torch", reason="torch is the peer")
    case = TINY[name](workbench(dtype, torch))
    with torch.no_grad():
        theirs = case.peer().to(torch.float64).numpy()  # before the run: RoPE works in place
    case.run()
    assert case.error() <= TOLERANCE[dtype]
    ours = case.out.astype(np.float64)
    if case.kernel == "attention":
        theirs = theirs[0].transpose(1, 0, 2)
    assert np.linalg.norm(theirs - ours) <= 3 * TOLERANCE[dtype] * np.linalg.norm(ours)
