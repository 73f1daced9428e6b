"""Time kernels beside a reference, in alternation: more threads, or another library.

    python bench/kernel_ratios.py threads [--threads 2] [--dtype bfloat16]
    OPENBLAS_CORETYPE=Zen python bench/kernel_ratios.py openblas

`threads` runs each kernel with one thread and with more. `openblas` runs float32 linears and
NumPy's products. OpenBLAS reads its core type before Python starts, so try several: the type that
it detects is not always the fastest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from pympa.bench.kernels.cases.attention import attention_case
from pympa.bench.kernels.cases.linear import linear_case, mlp_case
from pympa.bench.kernels.cases.workbench import Case, Workbench
from pympa.kernels.cpu import supported_isas

ISA = supported_isas()[0]
CASES: dict[str, Callable[[Workbench], Case]] = {
    "linear 2048x2048x2048": lambda bench: linear_case(bench, 2048, 2048, 2048),
    "mlp 512x1024x4096": lambda bench: mlp_case(bench, 512, 1024, 4096, False),
    "attention 4096x4096x8 of 64": lambda bench: attention_case(bench, 4096, 4096, 8, 64, False),
    "attention 4096x4096x4 of 128": lambda bench: attention_case(bench, 4096, 4096, 4, 128, True),
    "attention 4096x4096x1 of 512": lambda bench: attention_case(bench, 4096, 4096, 1, 512, False),
}
LINEARS = ((2048, 2048, 2048), (512, 4096, 1024), (1024, 1024, 4096))  # m, n, k


def ratio(ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> float:
    """Return the median seconds of `theirs` over those of `ours`, after one run of each."""
    ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for run, taken in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


def main() -> None:
    """Time and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["threads", "openblas"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--iterations", type=int, default=9)
    options = parser.parse_args()
    if options.what == "threads":
        for name, make in CASES.items():
            many, one = (make(Workbench(options.dtype, ISA, t, None)) for t in (options.threads, 1))
            gain = ratio(many.run, one.run, options.iterations)
            print(f"{options.dtype} {name}: {options.threads} threads are {gain:.2f} x one")
        return
    for m, n, k in LINEARS:
        bench = Workbench("float32", ISA, 1, None)
        x, out, theirs = bench.normal(m, k), bench.empty(m, n), bench.empty(m, n)
        weight, packed = bench.weight(n, k)
        columns = np.ascontiguousarray(weight.T)
        gain = ratio(
            lambda: bench.kernels.linear(x, packed, out),  # noqa: B023 called in this pass only
            lambda: np.matmul(x, columns, out=theirs),  # noqa: B023
            options.iterations,
        )
        core = os.environ.get("OPENBLAS_CORETYPE", "as found")
        print(f"float32 linear {m}x{n}x{k}: {gain:.2f} x OpenBLAS (core type {core})")


if __name__ == "__main__":
    main()
