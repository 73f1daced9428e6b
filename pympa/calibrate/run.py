"""One calibration, from the check of the request to the written profile."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from pympa.bench.machine import processor_name
from pympa.bench.memory import available_bytes
from pympa.bench.text_table import show
from pympa.caches import cache_of_rank
from pympa.calibrate.curves import device_peaks, measure_curves
from pympa.calibrate.links import LinkFit, measure_link
from pympa.calibrate.profile import error_table, profile_text
from pympa.cluster import Cluster, Device, Link, Origin
from pympa.curves import Curve
from pympa.errors import RefusedError
from pympa.files import refuse_special
from pympa.session import Session
from pympa.team import Team

_DEFAULT_DTYPES = ["float32", "bfloat16"]


def run(session: Session, options: argparse.Namespace) -> int:
    """Calibrate on all ranks and return the exit status. Collective.

    Raises:
        RefusedError: no file to write, ranks on several nodes, or fewer cores than ranks.
    """
    session.check(lambda: _check(options.output, session.rank))
    if len(set(session.world.gather_objects(platform.node()))) > 1:
        raise RefusedError("calibrate: expected the ranks of one node; these are on several")
    if session.oversubscribed:
        raise RefusedError(
            f"calibrate: expected a core for each rank; {session.size} ranks share "
            f"{session.processors}: start it with mpirun -n {session.processors}"
        )
    profile, link = calibrate(session, options.dtype or _DEFAULT_DTYPES)
    if session.rank == 0:
        Path(options.output).write_text(profile_text(profile))
        show(error_table(profile.device.curves, link))
        print(f"wrote {options.output}: {profile.title}", file=sys.stderr, flush=True)
    return 0


def calibrate(session: Session, dtypes: list[str]) -> tuple[Cluster, LinkFit | None]:
    """Measure a profile of this session's ranks. Collective."""
    curves: list[Curve] = []
    for dtype in dtypes:
        for ranks in sorted({1, session.size}):
            curves += session.on_first(ranks, partial(_curves_of, dtype=dtype))
    link = None
    if session.size > 1:
        link = measure_link(session, dtypes[0], session.reaches(range(session.size)))
    peaks = session.on_first(1, lambda team: device_peaks(team.isa, dtypes))
    flops, bandwidth = peaks
    device = Device(
        name=processor_name(),
        memory_bytes=available_bytes() // session.size,
        memory_bytes_per_second=bandwidth,
        flops_per_second=flops,
        curves=tuple(curves),
        cache_bytes=cache_of_rank(threads=1) or 0,
    )
    alone = Link(name="none", ranks=1, latency_seconds=0.0, bytes_per_second=bandwidth)
    profile = Cluster(
        title=f"{session.size} x a core of {device.name}, measured on {platform.node()}",
        ranks=session.size,
        measured=Origin(
            host=platform.node(),
            date=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            isa=session.isa,
            mpi=session.mpi_library,
            pympa=version("pympa"),
            message_error=0.0 if link is None else round(link.error, 4),
        ),
        device=device,
        links=(alone if link is None else link.link,),
    )
    return profile, link


def _curves_of(team: Team, dtype: str) -> list[Curve]:
    def tell(text: str) -> None:
        if team.rank == 0:
            print(f"measuring {text}", file=sys.stderr, flush=True)

    return measure_curves(team, dtype, tell)


def _check(output: str | None, rank: int) -> None:
    """Refuse a file that cannot be written before anything is measured.

    Raises:
        ValueError: there is none.
        OSError: it cannot be written; the message names it.
    """
    if output is None:
        raise ValueError("calibrate needs --output FILE.toml, where the profile goes")
    if not output.endswith(".toml"):
        raise ValueError(f"--output: expected a name that ends in .toml; got {output!r}")
    if rank == 0:
        try:
            refuse_special(output)
            Path(output).open("a").close()
        except OSError as error:
            raise OSError(f"--output {output}: {error.strerror}") from None
