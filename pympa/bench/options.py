"""The command line of `python -m pympa.bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pympa.command.line import Parser, add_batch, byte_count, count, seconds, threads
from pympa.errors import RefusedError
from pympa.transport.choice import DEVICE_TRANSPORTS

DEFAULT_TIMEOUT_SECONDS = 300.0
_CPU_OPTIONS = ("threads", "no_shared_memory", "isa")
_GPU_OPTIONS = ("device_transport", "energy", "nvtx")
_SIMULATION_OPTIONS = ("routing_from", "slow")
_RUN_OPTIONS = (
    "input",
    "router_skew",
    "cache",
    "warmup",
    "iterations",
    "repeat",
    "resume",
    "no_verify",
    "allow_long",
    "timeout",
)
_UNUSED = {
    "cpu": (*_GPU_OPTIONS, *_SIMULATION_OPTIONS),
    "cuda": (*_CPU_OPTIONS, *_SIMULATION_OPTIONS),
    "virtual": (*_RUN_OPTIONS, *_CPU_OPTIONS, *_GPU_OPTIONS),
}
"""The options that a backend does not use."""


def build_parser(prog: str = "python -m pympa.bench") -> Parser:
    """Return the parser."""
    parser = Parser(
        prog=prog,
        description="Verify and time ways of splitting a transformer over MPI ranks.",
        add_help=False,
    )
    add = parser.add_argument
    add(
        "experiments",
        nargs="*",
        metavar="EXPERIMENT",
        help="name of a packaged experiment, path of a TOML file, or a model directory; default: "
        "all packaged experiments",
    )
    add("-h", "--help", action="store_true", help="show this and exit")
    add("--list", action="store_true", help="list the experiments and exit")
    add(
        "--plan",
        action="append",
        metavar="PLAN",
        help="run this plan, as in tp=8,pp=2, instead of the experiment's plans; may be repeated",
    )
    add_batch(parser)
    add("--size", default="local", help="size of the experiment: local (default), paper, ...")
    add(
        "--backend",
        choices=("cpu", "cuda", "virtual"),
        default="cpu",
        help="cpu: run on the CPUs of these ranks (default); cuda: run on the GPUs of their nodes; "
        "virtual: predict the time on --cluster, in one process",
    )
    add(
        "--device-transport",
        choices=DEVICE_TRANSPORTS,
        default="auto",
        help="cuda backend: nccl; staged: MPI through host memory; auto (default): staged where "
        "ranks share a GPU or NCCL is missing, otherwise nccl",
    )
    add(
        "--cluster",
        metavar="NAME",
        help="hardware to simulate, for the virtual backend and for the simulated column of a "
        "measured table: a name, or a TOML file; default there: dgx-h100x2; none: no column",
    )
    add(
        "--routing-from",
        metavar="FILE.jsonl",
        help="virtual backend: use the experts' loads of a measured record of the experiment; "
        "default: even loads",
    )
    add(
        "--slow",
        action="append",
        metavar="WHAT",
        help="virtual backend: slow a part down: rank=3,factor=2 or link=0-8,factor=4; repeatable",
    )
    add("--input", metavar="FILE", help="text file; each of its bytes is a token")
    add("--dtype", help="float32, float16 or bfloat16 instead of the experiment's")
    add(
        "--router-skew",
        type=float,
        metavar="X",
        help="add -X·e/(experts - 1) to expert e's gate logits; 0: even, 3: the first is busiest",
    )
    add(
        "--cache",
        type=byte_count,
        metavar="BYTES",
        help="cache bytes of a rank, as in 50MB or 2MiB; the stages families cut chunks to fit it; "
        "default: the L2 of its cores and its share of L3; not used on GPUs",
    )
    add(
        "--weight-limit",
        type=byte_count,
        metavar="BYTES",
        help="cut layers into stages so that no rank holds more bytes of weight matrices than this",
    )
    add(
        "--warmup",
        type=count(0),
        metavar="N",
        help="number of steps before timing (0 after a step that is verified, else 1)",
    )
    add("--iterations", type=count(1), default=3, metavar="N", help="number of timed steps (3)")
    add(
        "--repeat",
        type=count(1),
        default=1,
        metavar="N",
        help="measure all plans N times, one after the other, to show the spread (1)",
    )
    add("--output", metavar="FILE.jsonl", help="append one JSON line for each plan")
    add(
        "--trace",
        metavar="FILE.json",
        help="write a timeline of one step of each plan on all ranks, for ui.perfetto.dev",
    )
    add(
        "--resume",
        action="store_true",
        help="skip plans that --output already has records of, measured in the same way",
    )
    add("--no-verify", action="store_true", help="skip the oracle; records are marked unverified")
    add(
        "--allow-long",
        action="store_true",
        help="run plans whose step takes at least ten minutes; they are refused otherwise",
    )
    add(
        "--timeout",
        type=seconds,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"longest wait for a message ({DEFAULT_TIMEOUT_SECONDS:g})",
    )
    add(
        "--threads",
        type=threads,
        default=1,
        metavar="N",
        help="threads of each rank (1), or auto: an even share of the cores that ranks may use",
    )
    add(
        "--no-shared-memory",
        action="store_true",
        help="send keys and values also to ranks of the same node, instead of sharing memory",
    )
    add(
        "--energy",
        action="store_true",
        help="cuda backend: measure joules for each token by NVML, two seconds more for each plan",
    )
    add(
        "--nvtx",
        action="store_true",
        help="cuda backend: name spans as ranges for NVIDIA's profilers",
    )
    add("--isa", metavar="NAME", help="instruction set of the kernels; default: the best")
    return parser


def refuse_overwriting(options: argparse.Namespace) -> int:
    """Refuse to overwrite a file that the job reads; return 0.

    Raises:
        RefusedError: an output is also an input; the message names the option and the file.
    """
    read = [*options.experiments, options.input, options.cluster]
    for option, more in (("output", None), ("trace", options.routing_from)):
        name = getattr(options, option)
        sources = [Path(path) for path in (*read, more) if path and Path(path).exists()]
        if name and Path(name).exists() and any(Path(name).samefile(path) for path in sources):
            raise RefusedError(f"--{option} {name}: expected another file; this job reads that one")
    return 0


def refuse_unused(options: argparse.Namespace) -> int:
    """Refuse options that the backend does not use; return 0.

    Raises:
        RefusedError: an option is not used; the message names the first of them.
    """
    parser = build_parser()
    for name in _UNUSED[options.backend]:
        if getattr(options, name) != parser.get_default(name):
            users = [backend for backend, unused in _UNUSED.items() if name not in unused]
            raise RefusedError(
                f"--{name.replace('_', '-')} works with --backend {' or '.join(users)}; "
                f"got --backend {options.backend}"
            )
    return 0
