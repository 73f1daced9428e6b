"""Check and time the CPU kernels of this machine: `python -m pympa.bench.kernels`.

Every case is compared with float64 before it is timed (sampled rows, the dtype's tolerance). With
a peer the runs alternate, so that both see the same noise. The reference is a roofline (Williams
et al. 2009): the rates that multiply-adds in registers and reads of a large buffer reach on one
core in the same run, times `threads`. A run takes at least max(flops / peak, bytes / bandwidth).
`peak_fraction` is that time over the measured time, and the larger term shows what limits the
kernel. It may exceed 1 where writes overlap reads, or where the machine was busier while the peak
was measured.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO

import msgspec

from pympa.bench.kernels.cases import CASES
from pympa.bench.kernels.cases.workbench import Case, Workbench
from pympa.bench.kernels.table import KernelRecord, Measured, Seconds, result_table
from pympa.command.line import (
    Parser,
    command_line,
    complain,
    count,
    thread_count,
    unblock_interrupts,
)
from pympa.errors import RefusedError
from pympa.kernels.cpu import supported_isas
from pympa.kernels.peaks import Machine, measure_core, peak_flops
from pympa.spec import DTYPES
from pympa.text.files import open_to_append
from pympa.text.table import show
from pympa.verify.contract import TOLERANCE

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_INT_MAX = 2**31 - 1
_WIDE = ("amx_bf16", "avx512_bf16", "avx512")
_CLEARLY = 1.2  # times the rate


class CheckError(Exception):
    """The error of a kernel's result exceeds its tolerance."""


def measure_cores(dtype: str, isa: str, threads: int) -> Machine:
    """Measure the peak rates of one core and multiply them by `threads`."""
    core = measure_core(dtype, isa)
    instructions = {name: threads * flops for name, flops in core.instructions.items()}
    return Machine(threads * core.flops_per_second, threads * core.bytes_per_second, instructions)


def faster_instruction_set(dtype: str, isa: str) -> str | None:
    """Return a note if another instruction set multiplies a dtype faster on this core.

    The default comes from a table of processors, not from this measurement, which could change
    from run to run, and bits of results with it.
    """
    mine = peak_flops(dtype, isa)
    others = {name: peak_flops(dtype, name) for name in supported_isas() if name in _WIDE}
    best = max(others, key=lambda name: others[name], default=isa)
    if others.get(best, 0.0) < _CLEARLY * mine:
        return None
    return (
        f"{dtype}: {best} is faster on this core than {isa} ({others[best] / 1e9:,.0f} and "
        f"{mine / 1e9:,.0f} GFLOP/s in registers); choose it with --isa {best}"
    )


def least_seconds(case: Case, cores: Machine) -> tuple[float, float]:
    """Return the least seconds that a run takes for its flops, and for its bytes."""
    return case.flops / cores.flops_per_second, case.bytes / cores.bytes_per_second


def _rates(cores: Machine) -> str:
    rate = f"{cores.flops_per_second / 1e9:,.0f} GFLOP/s"
    if len(cores.instructions) < 2:
        return rate
    parts = (f"{name} {flops / 1e9:,.0f}" for name, flops in cores.instructions.items())
    return f"{rate} ({', '.join(parts)})"


def _title(case: Case, dtype: str) -> str:
    words = [case.kernel, dtype, case.shape]
    if case.head_dim is not None:
        words.append(f"head_dim={case.head_dim}")
    return " ".join(words + (["causal"] if case.causal else []))


def check(case: Case, dtype: str) -> float:
    """Run a case once and return its relative error.

    Raises:
        CheckError: the error exceeds the dtype's tolerance, or is NaN.
    """
    case.run()
    error = case.error()
    if not error <= TOLERANCE[dtype]:
        raise CheckError(
            f"{_title(case, dtype)}: relative error: expected at most {TOLERANCE[dtype]:g}; "
            f"got {error:g}; not timed"
        )
    return error


def alternate(
    run: Callable[[], Any], peer: Callable[[], Any] | None, iterations: int
) -> tuple[Seconds, Seconds | None]:
    """Time alternating runs of a kernel and its peer, after one run of the peer to warm it up."""
    if peer is None:
        return _summary([_elapsed(run) for _ in range(iterations)]), None
    peer()
    pairs = [(_elapsed(run), _elapsed(peer)) for _ in range(iterations)]
    ours, theirs = zip(*pairs, strict=True)
    return _summary(ours), _summary(theirs)


def _elapsed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _summary(seconds: Sequence[float]) -> Seconds:
    return Seconds(statistics.median(seconds), min(seconds), max(seconds))


def measure(case: Case, dtype: str, cores: Machine, options: argparse.Namespace) -> KernelRecord:
    """Check a case, then time it.

    Args:
        case: the case to run.
        dtype: the dtype of the case's arrays.
        cores: the peak rates of the cores in this dtype.
        options: the isa, threads and iterations from the command line.

    Raises:
        CheckError: see `check`.
    """
    error = check(case, dtype)
    ours, peers = alternate(case.run, case.peer, options.iterations)
    return KernelRecord(
        kernel=case.kernel,
        dtype=dtype,
        head_dim=case.head_dim,
        causal=case.causal,
        tokens=case.tokens,
        shape=case.shape,
        threads=options.threads,
        seconds=ours,
        gflops=case.flops / ours.median / 1e9,
        gbytes_per_second=case.bytes / ours.median / 1e9,
        peak_fraction=max(least_seconds(case, cores)) / ours.median,
        torch_ratio=None if peers is None else peers.median / ours.median,
        error=error,
        verified=True,
        isa=options.isa,
        iterations=options.iterations,
        tolerance=TOLERANCE[dtype],
        checked_rows=case.checked_rows,
    )


def build_parser(prog: str = "python -m pympa.bench.kernels") -> Parser:
    """Return the parser of the command line."""
    isas = supported_isas()
    parser = Parser(prog=prog, description="Check and time the CPU kernels.", add_help=False)
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this and exit")
    add("--against", choices=["torch"], help="also time this library, in alternating runs")
    add("--threads", type=thread_count, default=1, metavar="N", help="threads of each kernel (1)")
    add("--dtype", choices=list(DTYPES), help="only this dtype; default: all")
    add("--kernel", choices=list(CASES), help="only these kernels; default: all")
    add("--isa", choices=isas, default=isas[0], help="instruction set; default: the best")
    add("--iterations", type=count(1), default=7, metavar="N", help="number of timed runs (7)")
    add("--output", metavar="FILE.jsonl", help="append one JSON line for each case")
    return parser


def import_torch(threads: int) -> Any:
    """Return torch, on `threads` threads and without gradients.

    torch allocates each result. The C library would return large blocks to the system at once,
    and new pages would cost torch more time than a norm does (5 times here). So freed memory stays
    in the process, where torch can reuse it, as our kernels reuse the arena.

    Raises:
        RefusedError: torch cannot be imported.
    """
    try:
        import torch
    except ImportError as error:
        raise RefusedError(
            f"--against torch: {error}; install it with: pip install 'pympa[peers]'"
        ) from None
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _INT_MAX)
    return torch


def run(options: argparse.Namespace, output: BinaryIO | None) -> None:
    """Run the cases that the options select, append records to `output`, print one table a dtype.

    Raises:
        CheckError: see `check`; no later case is run.
        RefusedError: see `import_torch`.
    """
    torch = import_torch(options.threads) if options.against == "torch" else None
    names = [options.kernel] if options.kernel else list(CASES)
    for dtype in [options.dtype] if options.dtype else list(DTYPES):
        cores = measure_cores(dtype, options.isa, options.threads)
        measured: list[Measured] = []
        for make in (make for name in names for make in CASES[name]):
            case = make(Workbench(dtype, options.isa, options.threads, torch))
            print(_title(case, dtype), file=sys.stderr, flush=True)
            record = measure(case, dtype, cores, options)
            flop_seconds, byte_seconds = least_seconds(case, cores)
            measured.append((record, "compute" if flop_seconds > byte_seconds else "memory"))
            if output is not None:
                output.write(msgspec.json.encode(record) + b"\n")
                output.flush()
        title = (
            f"{dtype}, {options.isa}, threads: {options.threads}, roofline: {_rates(cores)}, "
            f"{cores.bytes_per_second / 1e9:,.1f} GB/s"
        )
        show(result_table(title, measured))
        if dtype == "bfloat16" and (note := faster_instruction_set(dtype, options.isa)):
            print(note, file=sys.stderr)


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "ab", opener=open_to_append)
    except OSError as error:
        raise OSError(f"--output {path}: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, 1 if a kernel is wrong, or 2 if the request is refused."""
    unblock_interrupts()
    try:
        options = build_parser().parse_args(arguments)
        if options.help:
            print(build_parser().format_help())
            return 0
        with ExitStack() as stack:
            output = options.output and stack.enter_context(_open(options.output))
            run(options, output)
    except CheckError as error:
        complain(error)
        return 1
    except (RefusedError, OSError) as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))
