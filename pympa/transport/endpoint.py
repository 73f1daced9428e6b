"""Endpoints move bytes between the ranks of a world, without knowing axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pympa.hardware.device import flat_bytes
from pympa.plan.mesh import AXES, EXPERT_AXES
from pympa.runtime.arena import Array
from pympa.runtime.trace import Seen

WORLD = "world"  # control traffic: agreement, records, verification; never counted
CHANNELS = (WORLD, *AXES, *EXPERT_AXES, "ulysses")
"""The channels by number; see `Message`."""


class TransportError(RuntimeError):
    """Messages do not match, or did not arrive."""


class Message(NamedTuple):
    """A C-contiguous array and the rank of the other side.

    `channel` separates axes: messages of one channel and pair arrive in the order of sending.
    """

    array: Array
    peer: int
    channel: int


Reaches = Callable[[Sequence[int]], bool]


class Endpoint(Protocol):
    """Moves messages between the ranks of a world, without knowing axes."""

    rank: int
    size: int

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> Any:
        """Start messages; the caller must not touch the arrays until `wait`.

        `seen` is called for each message, in the first `poll`, `start` or `wait` of this rank after
        the message is done.
        """

    def wait(self, pending: Any, what: str) -> None:
        """Wait until all messages of `pending` are sent and received."""

    def poll(self) -> None:
        """Let messages progress while this rank computes."""

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Return whether these ranks can all read each other's shared memory; the same on all."""

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank."""


class NullEndpoint:
    """An endpoint that sends nothing: a world of one rank, or a rank whose arrays are shapes.

    Args:
        rank: the number of the rank in the world.
        size: the number of ranks of the world.
        reaches: a function that returns whether ranks share memory; None means that none do.
    """

    def __init__(self, rank: int, size: int, reaches: Reaches | None = None) -> None:
        self.rank = rank
        self.size = size
        self._reaches = reaches

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Return the result of the given function."""
        return self._reaches is not None and self._reaches(ranks)

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> None:
        """Report all messages as done."""
        for index in range(len(receives) + len(sends)):
            seen(index)

    def wait(self, pending: Any, what: str) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """Do nothing."""

    def copy(self, target: Array, source: Array) -> None:
        """Do nothing."""


def raw_bytes(array: Array) -> NDArray[np.uint8]:
    """Return a C-contiguous array's memory as bytes.

    Raises:
        TransportError: the array is not contiguous.
    """
    try:
        raw: NDArray[np.uint8] = flat_bytes(array)
    except ValueError as error:
        raise TransportError(f"message: {error}") from None
    return raw
