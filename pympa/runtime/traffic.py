"""Bytes that a rank sends, receives, and reads in other ranks' memory, by axis and peer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

ByPeer = Counter[tuple[str, int]]
"""The bytes by (axis, peer rank)."""


@dataclass
class Traffic:
    """Bytes by (axis, peer rank).

    Attributes:
        sent: the bytes in messages to the peer.
        received: the bytes in messages from the peer.
        read: the bytes of keys and values that were read in the peer's memory, without a message.
    """

    sent: ByPeer = field(default_factory=Counter)
    received: ByPeer = field(default_factory=Counter)
    read: ByPeer = field(default_factory=Counter)

    def copy(self) -> Traffic:
        """Return a copy of the counts."""
        return Traffic(self.sent.copy(), self.received.copy(), self.read.copy())

    def repeat(self, before: Traffic, after: Traffic, times: int) -> None:
        """Add the counts between two moments again, `times` times."""
        for counts, first, last in (
            (self.sent, before.sent, after.sent),
            (self.received, before.received, after.received),
            (self.read, before.read, after.read),
        ):
            for key, count in last.items():
                counts[key] += times * (count - first[key])

    def clear(self) -> None:
        """Restart the counts from zero; counters that were read before keep their counts."""
        self.sent, self.received, self.read = Counter(), Counter(), Counter()
