"""Which way messages go between devices, chosen openly: all ranks decide alike and can say why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pympa.arena import Arena
from pympa.device import Device
from pympa.errors import RefusedError
from pympa.trace import Trace
from pympa.transport import WORLD, Traffic, Transport
from pympa.transport.nccl import Nccl, NcclEndpoint
from pympa.transport.staged import StagedEndpoint

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint

Wish = Literal["auto", "nccl", "staged"]
WISHES: tuple[Wish, ...] = ("auto", "nccl", "staged")


class Offer(NamedTuple):
    """What one rank has.

    node: its name. bus_id: of its device. nccl: version of the library, "" without one.
    lack: why there is none.
    """

    node: str
    bus_id: str
    nccl: str
    lack: str


class Choice(NamedTuple):
    """nccl: messages go by NCCL. words: the way and why, for tables and records."""

    nccl: bool
    words: str


def choose(wish: Wish, offers: Sequence[Offer]) -> Choice:
    """Return the way of messages between the devices of these ranks.

    Args:
        wish: of the user; "auto" takes NCCL wherever it works.
        offers: of each rank.

    Raises:
        RefusedError: NCCL is wished for and cannot be had.
    """
    obstacle = _obstacle(offers)
    if wish == "nccl" and obstacle is not None:
        raise RefusedError(f"transport nccl: {obstacle}; take --device-transport staged")
    if wish == "staged":
        return Choice(False, "host-staged MPI: asked for")
    if obstacle is not None:
        return Choice(False, f"host-staged MPI: {obstacle}")
    return Choice(True, f"nccl {offers[0].nccl}")


def _obstacle(offers: Sequence[Offer]) -> str | None:
    """Return why NCCL cannot connect these ranks, or None."""
    for rank, offer in enumerate(offers):
        if not offer.nccl:
            return f"rank {rank} has {offer.lack}"
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
    wish: Wish,
    open_nccl: Callable[[], Nccl],
    *,
    timeout_seconds: float,
    naps: bool,
) -> tuple[NcclEndpoint | StagedEndpoint, str]:
    """Return an endpoint for arrays of devices, and the words of its `Choice`. Collective.

    Args:
        inner: for arrays of the host; the endpoint closes it.
        device: this rank's.
        node: name of this rank's.
        wish: of the user.
        open_nccl: returns the library, or raises RefusedError.
        timeout_seconds: longest time any single wait may take.
        naps: sleep between looks; for ranks that share cores.

    Raises:
        RefusedError: NCCL is wished for and cannot be had.
    """
    library, lack = None, ""
    try:
        library = open_nccl()
    except RefusedError as error:
        lack = str(error)
    world = Transport(inner, WORLD, range(inner.size), Arena(), Trace(), Traffic())
    offer = Offer(node, device.bus_id, library.version if library is not None else "", lack)
    choice = choose(wish, world.gather_objects(offer))
    if choice.nccl and library is not None:
        by_nccl = NcclEndpoint(inner, device, library, timeout_seconds=timeout_seconds, naps=naps)
        return by_nccl, choice.words
    staged = StagedEndpoint(inner, device, timeout_seconds=timeout_seconds, naps=naps)
    return staged, choice.words
