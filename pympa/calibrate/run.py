"""One calibration, from checking the request to writing the profile."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from pympa.calibrate.curves import device_peaks, measure_curves
from pympa.calibrate.links import LinkFit, measure_link
from pympa.calibrate.profile import error_table, profile_text
from pympa.costs.cluster import Cluster, Device, Link, Origin
from pympa.costs.curves import Curve
from pympa.errors import RefusedError
from pympa.hardware.caches import cache_of_rank
from pympa.hardware.cores import processor_name
from pympa.hardware.memory import available_bytes
from pympa.session.team import Team
from pympa.text.files import refuse_special
from pympa.text.table import show

_DEFAULT_DTYPES = ["float32", "bfloat16"]


def run(team: Team, options: argparse.Namespace) -> int:
    """Calibrate on all ranks and return the exit status. Collective.

    Raises:
        RefusedError: the output file is missing or cannot be written, the ranks are on several
            nodes, or there are fewer cores than ranks.
    """
    team.check(lambda: _check(options.output, team.rank))
    if len(set(team.world.gather_objects(platform.node()))) > 1:
        raise RefusedError("calibrate: expected all ranks on one node; got several nodes")
    if team.oversubscribed:
        raise RefusedError(
            f"calibrate: expected one core for each rank; got {team.size} ranks on "
            f"{team.processors} cores: start it with mpirun -n {team.processors}"
        )
    profile, link = calibrate(team, options.dtype or _DEFAULT_DTYPES)
    if team.rank == 0:
        Path(options.output).write_text(profile_text(profile))
        show(error_table(profile.device.curves, link))
        print(f"wrote {options.output}: {profile.title}", file=sys.stderr, flush=True)
    return 0


def calibrate(team: Team, dtypes: list[str]) -> tuple[Cluster, LinkFit | None]:
    """Measure a profile of this session's ranks. Collective."""
    curves: list[Curve] = []
    for dtype in dtypes:
        for ranks in sorted({1, team.size}):
            curves += team.on_first(ranks, partial(_curves_of, dtype=dtype))
    link = None
    if team.size > 1:
        link = measure_link(team, dtypes[0], team.reaches(range(team.size)))
    peaks = team.on_first(1, lambda team: device_peaks(team.isa, dtypes))
    flops, bandwidth = peaks
    device = Device(
        name=processor_name(),
        memory_bytes=available_bytes() // team.size,
        memory_bytes_per_second=bandwidth,
        flops_per_second=flops,
        curves=tuple(curves),
        cache_bytes=cache_of_rank(threads=1) or 0,
    )
    alone = Link(name="none", ranks=1, latency_seconds=0.0, bytes_per_second=bandwidth)
    profile = Cluster(
        title=f"{team.size} x a core of {device.name}, measured on {platform.node()}",
        ranks=team.size,
        measured=Origin(
            host=platform.node(),
            date=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            isa=team.isa,
            mpi=team.mpi_library,
            pympa=version("pympa"),
            message_error=0.0 if link is None else round(link.error, 4),
        ),
        device=device,
        links=(alone if link is None else link.link,),
    )
    return profile, link


def _curves_of(team: Team, dtype: str) -> list[Curve]:
    def progress(text: str) -> None:
        if team.rank == 0:
            print(f"measuring {text}", file=sys.stderr, flush=True)

    return measure_curves(team, dtype, progress)


def _check(output: str | None, rank: int) -> None:
    """Refuse a file that cannot be written, before anything is measured.

    Raises:
        ValueError: the file name is missing or does not end in .toml.
        OSError: the file cannot be written; the message names it.
    """
    if output is None:
        raise ValueError("calibrate needs --output FILE.toml, the file to write the profile to")
    if not output.endswith(".toml"):
        raise ValueError(f"--output: expected a file name that ends in .toml; got {output!r}")
    if rank == 0:
        try:
            refuse_special(output)
            Path(output).open("a").close()
        except OSError as error:
            raise OSError(f"--output {output}: {error.strerror}") from None
