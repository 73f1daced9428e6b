"""The console command `pympa`, which runs one of the command lines."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pympa.command.line import REFUSED, Parser, command_line, complain, disagree, once
from pympa.errors import RefusedError

COMMANDS = {
    "bench": ("pympa.bench.__main__", "verify and time ways of splitting a model over MPI ranks"),
    "kernels": ("pympa.bench.kernels.__main__", "check and time single kernels of one core"),
    "compare": ("pympa.bench.records.compare", "compare the records of two runs"),
    "footprint": (
        "pympa.cli.footprint",
        "print the memory that a plan needs, by rank and by layer, without MPI",
    ),
    "calibrate": ("pympa.calibrate.__main__", "measure this machine for the virtual backend"),
    "info": ("pympa.cli.info", "print what this machine, its MPI and this installation can run"),
}
_SHELLS = ("bash", "zsh", "tcsh")


def main() -> int:
    """Run this process's command and return its exit status."""
    return command_line(run)


def run(words: Sequence[str]) -> int:
    """Run a command and return its exit status."""
    if words and words[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[words[0]][0])
        return int(module.main(words[1:]))
    if disagree(words):
        return REFUSED
    return once(lambda: _without_command(words))


def _without_command(words: Sequence[str]) -> int:
    parser = build_parser()
    try:
        options = parser.parse_args(words)
    except RefusedError as error:
        return complain(error)
    if options.version:
        from importlib.metadata import version

        print(f"pympa {version('pympa')}")
    elif options.completion is not None:
        import shtab

        print(shtab.complete(parser, shell=options.completion))
    else:
        print(parser.format_help())
    return 0


def build_parser() -> Parser:
    """Return the parser of the console command and its subcommands."""
    parser = Parser(
        prog="pympa",
        description="Exact multi-rank inference of long-context transformers.",
        epilog="Under MPI: mpirun -n 16 pympa bench",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument(
        "--completion",
        choices=_SHELLS,
        help='print a completion script: eval "$(pympa --completion bash)"',
    )
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, (module, what) in COMMANDS.items():
        theirs = importlib.import_module(module).build_parser(prog=f"pympa {name}")
        commands.add_parser(name, help=what, parents=[theirs], add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
