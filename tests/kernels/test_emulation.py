"""The interpreter of CUDA finds what breaks a rule: it is what tests of GPU kernels rest on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

EXPECTED = [
    r"sum after a barrier: 512",
    r"sum without: -?nan",
    r"copy after a wait: 126 0",  # of 16 bytes only 12 are copied, the rest is zeros
    r"copy without: -?nan -?nan",
    r"mma: 0 wrong",
    r"barrier: CUDA emulation: thread \(0, 0, 0\) of block \(0, 0, 0\) waits at __syncthreads for "
    r"ever, with 39 others; 24 of 64 threads have ended",
    r"divergence: .* came to __shfl_sync while lanes of its warp wait at a vote or __syncwarp",
    r"early end: .*thread \(10, 0, 0\).* for ever, with 21 others; 42 of 64 threads have ended",
    r"write: .*block \(0, 0, 0\) wrote outside its dynamic shared memory of 64 bytes",
    r"load: .*thread \(4, 0, 0\).*: ldmatrix at offset 64 of 64 bytes of shared memory",
]


def test_rules_of_cuda(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "emulation"
    flags = ["-std=c++20", "-O1", "-DPYMPA_CUDA_EMULATED", f"-I{ROOT / 'csrc'}"]
    sources = ["tests/kernels/emulation.cu", "csrc/cuda/emulated/interpreter.cpp"]
    subprocess.run(
        [compiler, *flags, "-x", "c++", *sources, "-o", str(program)], cwd=ROOT, check=True,
        timeout=300,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(EXPECTED)
    for line, pattern in zip(lines, EXPECTED, strict=True):
        assert re.fullmatch(pattern, line), line
