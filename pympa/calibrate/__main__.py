"""The command line: `mpirun -n 2 python -m pympa.calibrate --output profile.toml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pympa.command.line import Parser, command_line, in_session, seconds, start

_DTYPES = ("float32", "float16", "bfloat16")


def build_parser(prog: str = "python -m pympa.calibrate") -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=prog,
        description="Measure this machine's kernels and messages, and write them for --cluster "
        "of the virtual backend. One rank measures only kernels; several also measure messages, "
        "and kernels while all ranks compute.",
        add_help=False,
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this and exit")
    add("--output", metavar="FILE.toml", help="file to write the profile to; required")
    add(
        "--dtype",
        action="append",
        choices=_DTYPES,
        help="measure this dtype; may be repeated; default: float32 and bfloat16",
    )
    add(
        "--timeout",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="longest wait for a message (300)",
    )
    add(
        "--no-shared-memory",
        action="store_true",
        help="write a profile of ranks that send keys and values, instead of sharing memory",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Measure, write the profile and print its fit errors; return the exit status."""
    options = start(build_parser(), arguments)
    if isinstance(options, int):
        return options
    from pympa.calibrate.run import run

    return in_session(
        lambda team: run(team, options),
        isa=None,
        threads=1,
        timeout_seconds=options.timeout,
        shares_memory=not options.no_shared_memory,
    )


if __name__ == "__main__":
    sys.exit(command_line(main))
