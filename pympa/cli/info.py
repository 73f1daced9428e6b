"""`pympa info`: the abilities of this machine, its MPI and this installation.

Works without mpirun, too; under mpirun it shows the ranks' nodes and cores.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pympa.command.line import Parser, number_list, once, start
from pympa.errors import RefusedError
from pympa.session.launch import mpi_library_name

_OPTIONAL = {
    "mpich": ("an MPI library from PyPI", "pip install 'pympa[mpich]'"),
    "cupy-cuda13x": ("arrays on GPUs", "pip install 'pympa[cuda]'"),
    "torch": ("the library that tests and benchmarks compare with", "pip install 'pympa[peers]'"),
    "pytest": ("the tests", "pip install 'pympa[test]'"),
}
_GPU_SECONDS = 30.0  # longer than a driver takes to start
_THREAD_LEVELS = ("single", "funneled", "serialized", "multiple")


def build_parser(prog: str = "pympa info") -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description="Print what this machine can run.", add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the facts on rank 0 and return the exit status."""
    options = start(build_parser(), arguments)
    if isinstance(options, int):
        return options
    from mpi4py import MPI

    from pympa.kernels.cpu import supported_isas

    ranks = MPI.COMM_WORLD.gather((platform.node(), sorted(os.sched_getaffinity(0))))
    offers = MPI.COMM_WORLD.gather(supported_isas())
    return once(lambda: _print_facts(ranks or [], offers or []))


def _print_facts(ranks: list[tuple[str, list[int]]], offers: list[list[str]]) -> int:
    from pympa.session.instruction_set import agree_on_isa
    from pympa.text.table import Table, show

    isa, note = agree_on_isa(offers, [node for node, _ in ranks], None)
    chosen = [("used by default", note or isa)]

    table = Table()
    table.add_column("", text=True)
    table.add_column("", text=True)
    for name, value in [
        *_software(),
        *_layout(ranks),
        *_hardware(),
        *chosen,
        *_gpu(),
        *_optional_parts(),
    ]:
        table.add_row(name, value)
    show(table)
    return 0


def _software() -> list[tuple[str, str]]:
    import mpi4py
    import numpy as np
    from mpi4py import MPI

    library = mpi_library_name(MPI.Get_library_version())
    level = _THREAD_LEVELS[MPI.Query_thread()]
    return [
        ("pympa", version("pympa")),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("NumPy", np.__version__),
        ("MPI", f"{library}, standard {'.'.join(map(str, MPI.Get_version()))}, threads {level}"),
        ("mpi4py", mpi4py.__version__),
        ("launcher", shutil.which("mpirun") or "mpirun is not in PATH"),
    ]


def _layout(ranks: list[tuple[str, list[int]]]) -> list[tuple[str, str]]:
    nodes: defaultdict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    for rank, (node, cores) in enumerate(ranks):
        nodes[node].append((rank, cores))
    rows = []
    for node, placed in nodes.items():
        cores = sorted(set().union(*(c for _, c in placed)))
        shared = ", shared" if len(placed) > len(cores) else ""
        who = number_list([rank for rank, _ in placed])
        rows.append((f"node {node}", f"ranks {who} on cores {number_list(cores)}{shared}"))
    return rows


def _hardware() -> list[tuple[str, str]]:
    from pympa.hardware.caches import read_caches
    from pympa.hardware.cores import processor_name
    from pympa.hardware.memory import available_bytes
    from pympa.kernels.cpu import supported_isas, why_no_tiles

    refused = why_no_tiles()
    return [
        ("processor", processor_name()),
        ("instruction sets", ", ".join(supported_isas())),
        *([("matrix tiles (AMX)", f"not used: {refused}")] if refused else []),
        ("caches", ", ".join(map(str, read_caches())) or "unknown"),
        ("memory available", f"{available_bytes() / 2**30:.1f} GiB"),
    ]


def _gpu() -> list[tuple[str, str]]:
    """Return the GPU that `--backend cuda` would use on this node, or why it would refuse."""
    from pympa.kernels.cuda import open_accelerator

    try:
        device = open_accelerator(0, timeout_seconds=_GPU_SECONDS).device
    except RefusedError as error:
        return [("GPU", f"none: {str(error).removeprefix('backend cuda: ')}")]
    free, total = (size / 2**30 for size in device.memory())
    return [("GPU", f"{device.name}, {free:.1f} of {total:.1f} GiB free")]


def _optional_parts() -> list[tuple[str, str]]:
    rows = []
    for name, (what, how) in _OPTIONAL.items():
        try:
            state = version(name)
        except PackageNotFoundError:
            present: Any = importlib.util.find_spec(name)
            state = "present" if present else f"missing; install it with: {how}"
        rows.append((name, f"{state} ({what})"))
    return rows
