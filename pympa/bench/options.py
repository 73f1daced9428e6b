"""The command line of `python -m pympa.bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pympa.command import Parser, byte_count, count, seconds, threads
from pympa.errors import RefusedError
from pympa.transport.choice import WISHES

DEFAULT_TIMEOUT_SECONDS = 300.0
_OF_CPUS = ("threads", "no_shared_memory", "isa")
_OF_GPUS = ("device_transport", "energy", "nvtx")
_OF_SIMULATIONS = ("routing_from", "slow")
_OF_RUNS = (
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
_IDLE = {
    "cpu": (*_OF_GPUS, *_OF_SIMULATIONS),
    "cuda": (*_OF_CPUS, *_OF_SIMULATIONS),
    "virtual": (*_OF_RUNS, *_OF_CPUS, *_OF_GPUS),
}
"""Options that a backend has no use for."""


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
        help="name of a packaged experiment or path of a TOML file; default: all packaged ones",
    )
    add("-h", "--help", action="store_true", help="show this and exit")
    add("--list", action="store_true", help="list the experiments and exit")
    add(
        "--plan",
        action="append",
        metavar="PLAN",
        help="run this plan, as in tp=8,pp=2, instead of the experiment's; may be repeated",
    )
    add("--size", default="local", help="size of the experiment: local (default), paper, ...")
    add(
        "--backend",
        choices=("cpu", "cuda", "virtual"),
        default="cpu",
        help="cpu: run on these ranks (default); cuda: run on the GPUs of their nodes; virtual: "
        "predict --cluster's time, in one process",
    )
    add(
        "--device-transport",
        choices=WISHES,
        default="auto",
        help="of the cuda backend: NCCL, MPI through memory of the host, or auto: staged where "
        "ranks share a GPU or there is no NCCL (default)",
    )
    add(
        "--cluster",
        metavar="NAME",
        help="hardware of the virtual backend, and of the simulated column of a measured table: a "
        "name, or a TOML file; measured: dgx-h100x2 (default), none leaves the column out",
    )
    add(
        "--routing-from",
        metavar="FILE.jsonl",
        help="of the virtual backend: experts' loads as a measured record of the experiment has "
        "them; default: even ones",
    )
    add(
        "--slow",
        action="append",
        metavar="WHAT",
        help="of the virtual backend: rank=3,factor=2 or link=0-8,factor=4; may be repeated",
    )
    add("--input", metavar="FILE", help="text whose bytes are the tokens")
    add("--dtype", help="float32, float16 or bfloat16 instead of the experiment's")
    add(
        "--router-skew",
        type=float,
        metavar="X",
        help="expert e's gate logits get -X·e/(experts - 1): 0 is even, 3 makes the first busiest",
    )
    add(
        "--cache",
        type=byte_count,
        metavar="BYTES",
        help="cache of a rank, as in 50MB or 2MiB, that chunks of the stages families fit; "
        "default: second level of its cores and its share of the third; none on GPUs",
    )
    add(
        "--weight-limit",
        type=byte_count,
        metavar="BYTES",
        help="cut layers into stages so that no rank holds more of the weight matrices",
    )
    add("--warmup", type=count(0), default=1, metavar="N", help="steps before timing (1)")
    add("--iterations", type=count(1), default=3, metavar="N", help="timed steps (3)")
    add(
        "--repeat",
        type=count(1),
        default=1,
        metavar="N",
        help="measure all plans in turn N times, to see the spread (1)",
    )
    add("--output", metavar="FILE.jsonl", help="append one JSON line for each plan")
    add(
        "--trace",
        metavar="FILE.json",
        help="write one step of each plan on all ranks, for https://ui.perfetto.dev",
    )
    add(
        "--resume",
        action="store_true",
        help="skip plans that --output already has records of, measured the same way",
    )
    add("--no-verify", action="store_true", help="skip the oracle; records say so")
    add(
        "--allow-long",
        action="store_true",
        help="run plans, refused otherwise, whose step takes more than ten minutes at best",
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
        help="send keys and values to ranks of the same node, too, instead of reading them there",
    )
    add(
        "--energy",
        action="store_true",
        help="of the cuda backend: measure joules a token by NVML, two seconds more for each plan",
    )
    add(
        "--nvtx",
        action="store_true",
        help="of the cuda backend: name spans as ranges for NVIDIA's profilers",
    )
    add("--isa", metavar="NAME", help="instruction set of the kernels; default: the best")
    return parser


def refuse_overwriting(options: argparse.Namespace) -> int:
    """Refuse to write over what the job reads; return 0.

    Raises:
        RefusedError: names the option and the file.
    """
    read = [*options.experiments, options.input, options.cluster]
    for option, more in (("output", None), ("trace", options.routing_from)):
        name = getattr(options, option)
        sources = [Path(path) for path in (*read, more) if path and Path(path).exists()]
        if name and Path(name).exists() and any(Path(name).samefile(path) for path in sources):
            raise RefusedError(f"--{option} {name}: expected a file that this job does not read")
    return 0


def refuse_idle(options: argparse.Namespace) -> int:
    """Refuse options that the backend has no use for; return 0.

    Raises:
        RefusedError: names the first of them.
    """
    parser = build_parser()
    for name in _IDLE[options.backend]:
        if getattr(options, name) != parser.get_default(name):
            users = [backend for backend, idle in _IDLE.items() if name not in idle]
            raise RefusedError(
                f"--{name.replace('_', '-')} is of --backend {' or '.join(users)}; "
                f"{options.backend} has no use for it"
            )
    return 0
