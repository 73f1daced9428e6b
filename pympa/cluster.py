"""Hardware as data: what a device computes and how devices are linked. One TOML file a cluster."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any

import msgspec

from pympa.curves import Curve
from pympa.files import read_file
from pympa.spec import SpecError
from pympa.toml import convert_toml, load_toml

LARGE_START_BYTES = 64 << 10
LARGEST_FILE_BYTES = 4 << 20  # a profile with the curves of all kernels is a tenth of that
_MOST_BASES = 16  # files that are based on each other, in a row

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class AttentionRate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """FLOP/s of an attention kernel at a head_dim, in the flops that its mask lets through."""

    head_dim: Count
    full: Positive
    causal: Positive


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one rank computes with.

    Attributes:
        name: of the product. watts: board power.
        memory_bytes: capacity. memory_bytes_per_second: peak of reads and writes.
        memory_efficiency: reached part of it.
        flops_per_second: peak by dtype. linear_efficiency: part of it that large products reach.
        linear_tile: rows and columns of an output tile; products are padded to it.
        processors: that take a tile each; the last wave of tiles may leave some idle.
        launch_seconds: shortest time of a kernel.
        attention: rates by head_dim.
        curves: of its kernels, measured; they stand in the place of the five before them.
        cache_bytes: of a processor that has curves: weights beyond come from memory.
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
                f"device {self.name}: expected either rates of attention, with the other figures "
                "of a data sheet, or measured curves"
            )
        for curve in self.curves:
            if curve.dtype and curve.dtype not in self.flops_per_second:
                raise SpecError(
                    f"device {self.name}: flops_per_second: expected a peak of each dtype that has "
                    f"curves; {curve.dtype} has none"
                )


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How ranks of one group reach each other.

    Attributes:
        name: of the product. ranks: neighbours in a group.
        latency_seconds: of a message. bytes_per_second: of a port, each way.
        ranks_at_port: neighbours that share a port.
        start_seconds, message_seconds: of the rank's own time each time that it posts messages,
            and for each of them. large_start_seconds: where they have `LARGE_START_BYTES` or more,
            for kernels that make as much leave caches cold, and ranks apart.
        shares_memory: ranks read each other's keys and values where they are.
        processors: of a device, that messages keep from kernels while they are under way.
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
    """Where and when a profile was measured.

    Attributes:
        host, date: in UTC. isa: of the kernels. mpi: its library. pympa: version.
        message_error: median relative error of messages by latency and bandwidth.
    """

    host: str
    date: str
    isa: str
    mpi: str
    pympa: str
    message_error: float


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A TOML file.

    Attributes:
        title: one line. ranks: devices.
        device: of every rank. links: from the innermost group outwards.
        measured: by whom, if the device has measured curves.
    """

    title: str
    ranks: Count
    measured: Origin | None = None
    device: Device
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        sizes = [link.ranks for link in self.links]
        if not sizes or sizes != sorted(sizes) or sizes[-1] < self.ranks:
            raise SpecError(
                f"links: expected groups from the smallest to all {self.ranks} ranks; got {sizes}"
            )
        busiest = max(link.processors for link in self.links)
        if busiest >= self.device.processors:
            raise SpecError(
                f"links: expected messages to leave some of the device's {self.device.processors} "
                f"processors to kernels; got {busiest} that they keep"
            )

    def shares_memory(self, ranks: Sequence[int]) -> bool:
        """Tell whether all these ranks read each other's memory."""
        return self.link(min(ranks), max(ranks)).shares_memory

    def link(self, a: int, b: int) -> Link:
        """Return what ranks `a` and `b` reach each other by."""
        return next(link for link in self.links if a // link.ranks == b // link.ranks)


def packaged_clusters() -> list[str]:
    """Return the names of the clusters that ship with the package."""
    folder = resources.files("pympa") / "clusters"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith("toml"))


def load_cluster(name: str) -> Cluster:
    """Load a packaged cluster by name, or anybody's by the path of its TOML file.

    A file that says `based_on = "dgx-h100x2"` gives only what differs from that cluster: fields of
    the device one by one, links all together.

    Raises:
        SpecError: no such cluster, or a field of the file is wrong.
    """
    return convert_toml(_fields(name, ()), Cluster, name)


def _fields(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a file and of what it is based on.

    Args:
        name: of the file.
        above: files that are based on it.
    """
    if name in above:
        raise SpecError(f"{above[0]}: based on itself: {' on '.join((*above, name))}")
    if len(above) > _MOST_BASES:
        raise SpecError(
            f"{above[0]}: expected at most {_MOST_BASES} files that are based on each other; "
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
        return (resources.files("pympa") / "clusters" / f"{name}.toml").read_bytes()
    if name.endswith(".toml") or "/" in name:
        try:
            return read_file(name, LARGEST_FILE_BYTES)
        except OSError as error:
            raise SpecError(f"cluster {name}: {error.strerror}") from None
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SpecError(f"cluster {name!r}: expected one of {', '.join(known)}, or a .toml file{hint}")
