"""The choice of the route between devices: all ranks choose the same one, with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pympa.errors import RefusedError
from pympa.hardware.device import Device
from pympa.transport import world_transport
from pympa.transport.nccl import Nccl, NcclEndpoint
from pympa.transport.staged import StagedEndpoint

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint

DeviceTransport = Literal["auto", "nccl", "staged"]
DEVICE_TRANSPORTS: tuple[DeviceTransport, ...] = ("auto", "nccl", "staged")


class Offer(NamedTuple):
    """The devices and libraries of one rank.

    Attributes:
        node: the name of its node.
        bus_id: the bus address of its device.
        nccl: the version of NCCL; "" without NCCL.
        lack: the reason why NCCL is missing.
    """

    node: str
    bus_id: str
    nccl: str
    lack: str


class Choice(NamedTuple):
    """The route of messages between devices.

    Attributes:
        nccl: whether messages go by NCCL.
        words: the route and its reason, for tables and records.
    """

    nccl: bool
    words: str


def choose(asked: DeviceTransport, offers: Sequence[Offer]) -> Choice:
    """Return the route of messages between the devices of these ranks.

    Args:
        asked: the user's choice; "auto" uses NCCL wherever it works.
        offers: the devices and libraries of each rank.

    Raises:
        RefusedError: NCCL is requested and does not work.
    """
    obstacle = _obstacle(offers)
    if asked == "nccl" and obstacle is not None:
        raise RefusedError(f"transport nccl: {obstacle}; use --device-transport staged")
    if asked == "staged":
        return Choice(False, "host-staged MPI: as requested")
    if obstacle is not None:
        return Choice(False, f"host-staged MPI: {obstacle}")
    return Choice(True, f"nccl {offers[0].nccl}")


def _obstacle(offers: Sequence[Offer]) -> str | None:
    """Return the reason why NCCL cannot connect these ranks, or None."""
    for rank, offer in enumerate(offers):
        if not offer.nccl:
            return f"rank {rank}: {offer.lack}"
        if offer.nccl != offers[0].nccl:
            return f"rank 0 has NCCL {offers[0].nccl}, rank {rank} has {offer.nccl}"
    users: dict[tuple[str, str], int] = {}
    for rank, offer in enumerate(offers):
        first = users.setdefault((offer.node, offer.bus_id), rank)
        if first != rank:
            return f"ranks {first} and {rank} share GPU {offer.bus_id}"
    return None


def connect_devices(
    inner: MpiEndpoint,
    device: Device,
    node: str,
    asked: DeviceTransport,
    open_nccl: Callable[[], Nccl],
    *,
    timeout_seconds: float,
    sleeps: bool,
) -> tuple[NcclEndpoint | StagedEndpoint, str]:
    """Return an endpoint for arrays of devices, and the words of its `Choice`. Collective.

    Args:
        inner: the endpoint for arrays of the host, which the new endpoint closes.
        device: the device of this rank.
        node: the name of this rank's node.
        asked: the user's choice; see `choose`.
        open_nccl: a function that returns the library, or raises RefusedError.
        timeout_seconds: the longest time of a single wait.
        sleeps: whether ranks sleep between polls, because they share cores.

    Raises:
        RefusedError: NCCL is requested and does not work.
    """
    library, lack = None, ""
    try:
        library = open_nccl()
    except RefusedError as error:
        lack = str(error)
    world = world_transport(inner)
    offer = Offer(node, device.bus_id, library.version if library is not None else "", lack)
    choice = choose(asked, world.gather_objects(offer))
    if choice.nccl and library is not None:
        by_nccl = NcclEndpoint(
            inner, device, library, timeout_seconds=timeout_seconds, sleeps=sleeps
        )
        return by_nccl, choice.words
    staged = StagedEndpoint(inner, device, timeout_seconds=timeout_seconds, sleeps=sleeps)
    return staged, choice.words
