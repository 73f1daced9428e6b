"""The main job: `mpirun -n 16 python -m pympa.bench [EXPERIMENT ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pympa.command.line import Parser, command_line, in_session, once, start


def build_parser(prog: str = "python -m pympa.bench") -> Parser:
    """Return the parser of the command line."""
    from pympa.bench import options

    return options.build_parser(prog)


def main(arguments: Sequence[str]) -> int:
    """Run the job on this rank and return its exit status."""
    # The oracle shares out its rows itself, beside which threads of BLAS would only spin. NumPy
    # reads this when it is imported, which is not yet so.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from pympa.bench.options import refuse_overwriting, refuse_unused

    options = start(build_parser(), arguments)
    if isinstance(options, int):
        return options
    if options.list:
        return once(lambda: _print_list(options.experiments))
    if refused := once(lambda: refuse_unused(options) or refuse_overwriting(options)):
        return refused
    if options.backend == "virtual":
        from pympa.bench.simulate.run import simulate

        return once(lambda: simulate(options))
    from pympa.bench.measure.run import run

    return in_session(
        lambda team: run(team, options),
        isa=options.isa,
        threads=options.threads,
        timeout_seconds=options.timeout,
        shares_memory=not options.no_shared_memory,
        backend=options.backend,
        device_transport=options.device_transport,
    )


def _print_list(names: Sequence[str]) -> int:
    from pympa.bench.experiment.description import load_experiment, packaged_experiments
    from pympa.bench.report.table import experiment_list
    from pympa.text.table import show

    loaded = {name: load_experiment(name) for name in names or packaged_experiments()}
    show(experiment_list(loaded))
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))
