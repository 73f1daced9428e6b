"""Hardware as data: the rates of a device and the links between devices, in one TOML file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any

import msgspec

from pympa.costs.curves import Curve
from pympa.spec import SpecError
from pympa.text.files import read_file
from pympa.text.toml import convert_toml, load_toml

LARGE_START_BYTES = 64 << 10
LARGEST_FILE_BYTES = 4 << 20  # ten times the size of a profile with the curves of all kernels
_MOST_BASES = 16  # files in a chain of `based_on`

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class AttentionRate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """FLOP/s of an attention kernel at a head_dim; only pairs that the mask admits are counted."""

    head_dim: Count
    full: Positive
    causal: Positive


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The device of one rank.

    Attributes:
        name: the name of the product.
        watts: the board power.
        memory_bytes: the capacity of the memory.
        memory_bytes_per_second: the peak rate of reads and writes.
        memory_efficiency: the share of that peak that kernels reach.
        flops_per_second: the peak by dtype.
        linear_efficiency: the share of the peak that large products reach.
        linear_tile: the rows and columns of an output tile; products are padded to it.
        processors: the number of processors, one tile each; the last wave may leave some idle.
        launch_seconds: the shortest time of a kernel.
        attention: the attention rates by head_dim.
        curves: the measured curves of its kernels, which replace linear_efficiency, linear_tile,
            processors, launch_seconds and attention.
        cache_bytes: the cache of a processor that has curves; other weights come from memory.
    """

    name: str
    memory_bytes: Positive
    memory_bytes_per_second: Positive
    flops_per_second: dict[str, Positive]
    watts: NotNegative = 0.0
    processors: Count = 1
    launch_seconds: NotNegative = 0.0
    linear_efficiency: Share = 1.0
    linear_tile: tuple[Count, Count] = (1, 1)
    memory_efficiency: Share = 1.0
    attention: tuple[AttentionRate, ...] = ()
    curves: tuple[Curve, ...] = ()
    cache_bytes: NotNegative = 0.0

    def __post_init__(self) -> None:
        if bool(self.attention) == bool(self.curves):
            raise SpecError(
                f"device {self.name}: expected one of attention, with the other figures of a data "
                "sheet, and curves, which are measured"
            )
        for curve in self.curves:
            if curve.dtype and curve.dtype not in self.flops_per_second:
                raise SpecError(
                    f"device {self.name}: flops_per_second: expected a peak for each dtype with "
                    f"curves; got none for {curve.dtype}"
                )


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The connection between the ranks of one group.

    Attributes:
        name: the name of the product.
        ranks: the number of neighbouring ranks in a group.
        latency_seconds: the latency of a message.
        bytes_per_second: the bandwidth of a port, in each direction.
        ranks_at_port: the number of neighbouring ranks that share a port.
        start_seconds: the rank's own seconds for each call that posts messages.
        large_start_seconds: the same for at least `LARGE_START_BYTES` in total: the kernels
            that wrote so much have filled the caches, and ranks are less synchronous.
        message_seconds: the rank's own seconds for each message.
        shares_memory: whether ranks read each other's keys and values in shared memory.
        processors: the processors of a device that kernels cannot use while messages are under way.
    """

    name: str
    ranks: Count
    latency_seconds: NotNegative
    bytes_per_second: Positive
    ranks_at_port: Count = 1
    start_seconds: NotNegative = 0.0
    large_start_seconds: NotNegative = 0.0
    message_seconds: NotNegative = 0.0
    shares_memory: bool = False
    processors: Annotated[int, msgspec.Meta(ge=0)] = 0


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The place and time of the measurement of a profile.

    Attributes:
        host: the name of the node.
        date: the date and time in UTC.
        isa: the instruction set of the kernels.
        mpi: the name of the MPI library.
        pympa: the version of pympa.
        message_error: the median relative error of messages, fitted by latency and bandwidth.
    """

    host: str
    date: str
    isa: str
    mpi: str
    pympa: str
    message_error: float


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of a cluster's TOML file.

    Attributes:
        title: the title, one line.
        ranks: the number of devices.
        measured: the origin of the profile; None without measured curves.
        device: the device of every rank.
        links: the links, from the innermost group outwards.
    """

    title: str
    ranks: Count
    measured: Origin | None = None
    device: Device
    links: tuple[Link, ...]

    @property
    def isa(self) -> str | None:
        """The instruction set of the CPUs that were measured; None without measured curves."""
        return None if self.measured is None else self.measured.isa

    def __post_init__(self) -> None:
        sizes = [link.ranks for link in self.links]
        if not sizes or sizes != sorted(sizes) or sizes[-1] < self.ranks:
            raise SpecError(
                f"links: expected groups from the smallest to all {self.ranks} ranks; got {sizes}"
            )
        busiest = max(link.processors for link in self.links)
        if busiest >= self.device.processors:
            raise SpecError(
                f"links: processors: expected fewer than the device's {self.device.processors} "
                f"processors, because kernels need some; got {busiest}"
            )

    def shares_memory(self, ranks: Sequence[int]) -> bool:
        """Return whether all these ranks read each other's memory."""
        return self.link(min(ranks), max(ranks)).shares_memory

    def link(self, a: int, b: int) -> Link:
        """Return the link between ranks `a` and `b`."""
        return next(link for link in self.links if a // link.ranks == b // link.ranks)


def packaged_clusters() -> list[str]:
    """Return the names of the clusters that ship with the package."""
    folder = resources.files("pympa") / "costs" / "clusters"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith("toml"))


def load_cluster(name: str) -> Cluster:
    """Load a packaged cluster by its name, or your own by the path of its TOML file.

    A file with `based_on = "dgx-h100x2"` gives only what differs from that cluster: fields of
    the device, or all links.

    Raises:
        SpecError: no such cluster exists, or a field of the file is wrong.
    """
    return convert_toml(_fields(name, ()), Cluster, name)


def _fields(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a file, and of the file that it is based on.

    Args:
        name: the name of the file.
        above: the names of the files that are based on it.
    """
    if name in above:
        raise SpecError(
            f"{above[0]}: based_on: expected no cycle; got {' based on '.join((*above, name))}"
        )
    if len(above) > _MOST_BASES:
        raise SpecError(
            f"{above[0]}: based_on: expected a chain of at most {_MOST_BASES} files; "
            f"{name} is one more"
        )
    given = load_toml(_read(name), name)
    base_name, device = given.pop("based_on", ""), given.setdefault("device", {})
    if not isinstance(base_name, str) or not isinstance(device, dict):
        raise SpecError(f'{name}: expected based_on = "NAME" and a table [device]')
    if not base_name:
        return given
    base = _fields(base_name, (*above, name))
    return {**base, **given, "device": {**base["device"], **device}}


def _read(name: str) -> bytes:
    known = packaged_clusters()
    if name in known:
        return (resources.files("pympa") / "costs" / "clusters" / f"{name}.toml").read_bytes()
    if name.endswith(".toml") or "/" in name:
        try:
            return read_file(name, LARGEST_FILE_BYTES)
        except OSError as error:
            raise SpecError(f"cluster {name}: {error.strerror}") from None
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SpecError(
        f"cluster {name!r}: expected one of {', '.join(known)}, or the path of a .toml file{hint}"
    )
