"""The command line of `python -m pympa.bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from pympa.session import DEFAULT_TIMEOUT_SECONDS, RefusedError
from pympa.spec import DTYPES


class _Parser(argparse.ArgumentParser):
    """Leaves printing and exiting to the one rank that speaks."""

    def error(self, message: str) -> NoReturn:
        raise RefusedError(f"{message}\n{self.format_usage().rstrip()}")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `help` is the text to print if it was asked for, else None.

    Raises:
        RefusedError: an option is unknown or has a bad value.
    """
    parser = _build()
    options = parser.parse_args(arguments)
    options.help = parser.format_help() if options.help else None
    return options


def _build() -> _Parser:
    parser = _Parser(
        prog="python -m pympa.bench",
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
    add("--input", metavar="FILE", help="text whose bytes are the tokens")
    add("--dtype", choices=list(DTYPES), help="instead of the experiment's")
    add("--warmup", type=_count(0), default=1, metavar="N", help="steps before timing (1)")
    add("--iterations", type=_count(1), default=3, metavar="N", help="timed steps (3)")
    add("--output", metavar="FILE.jsonl", help="append one JSON line for each plan")
    add("--no-verify", action="store_true", help="skip the oracle; records say so")
    add(
        "--timeout",
        type=_seconds,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"longest wait for a message ({DEFAULT_TIMEOUT_SECONDS:g})",
    )
    add("--threads", type=_count(1), default=1, metavar="N", help="threads of each rank (1)")
    add("--isa", metavar="NAME", help="instruction set of the kernels; default: the best")
    return parser


def _count(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}; got {text!r}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0; got {text!r}")
    return seconds
