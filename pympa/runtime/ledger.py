"""The use of an arena's bytes, by part of the model and by use, at high-water marks.

Every allocated byte has one part and one use, so the bytes by use add up to the high-water mark.
The ledger also records the tile of the weights that a kernel reads. So it knows the working set of
a layer's step: the bytes that must stay in the cache while one chunk of rows goes through it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal, get_args

Use = Literal["weights", "loading", "activations", "keys/values", "messages", "workspaces"]
USES: tuple[Use, ...] = get_args(Use)
TILE = "weight tile"  # a part of the weights that is read, not allocated
BETWEEN = "between kernels"
OUTSIDE_LAYERS = "outside layers"
"""The part for everything that is not in a layer: embedding, head, residual stream, tables."""

_Entry = tuple[tuple[str, str], int]
"""A part and a use, and the bytes that became in use."""

Uses = Mapping[str, int]
"""The bytes by use."""


class Ledger:
    """The record of the bytes of one arena.

    Attributes:
        part: the part of the model that allocates now, as in "layers.0".
        peak_beside_kept: the most bytes that were in use at one time, keys and values not counted.
        parts: the bytes by use of each part at its own high-water mark, after loading.
        working: the bytes that the steps of each part use: `TILE`, "workspaces" and the arrays
            `BETWEEN` kernels, each at its maximum.
    """

    def __init__(self) -> None:
        self.part = OUTSIDE_LAYERS
        self.parts: dict[str, Uses] = {}
        self.working: dict[str, Uses] = {}
        self.peak_beside_kept = 0
        self._peak_bytes = 0
        self._held: Counter[tuple[str, str]] = Counter()
        self._kept = 0
        # What is in use, in order: so a mark is a place, and a peak is a place and what followed
        # there. Copies of all that is in use would take too long for many layers.
        self._log: list[_Entry] = []
        self._peak_at = 0
        self._peak_rest: list[_Entry] = []

    @property
    def peak(self) -> dict[tuple[str, str], int]:
        """The bytes by (part, use) at the arena's high-water mark."""
        found: Counter[tuple[str, str]] = Counter()
        for key, size in (*self._log[: self._peak_at], *self._peak_rest):
            if key[1] != TILE:
                found[key] += size
        return dict(found)

    def take(self, use: Use, size: int, used_bytes: int) -> None:
        """Record an allocation of `size` bytes, after which `used_bytes` are in use in total."""
        self._add(use, size)
        if used_bytes > self._peak_bytes:
            self._set_peak(used_bytes)
        self.peak_beside_kept = max(self.peak_beside_kept, used_bytes - self._kept)
        _keep_most(self.parts, self.part, {use: self._of(use) for use in USES if use != "loading"})
        self._record_working_set()

    def restart_peak(self, used_bytes: int) -> None:
        """Restart `peak` and `peak_beside_kept` from the bytes in use."""
        self._set_peak(used_bytes)
        self.peak_beside_kept = used_bytes - self._kept

    def read(self, size: int) -> None:
        """Record that a kernel reads a weight in tiles of `size` bytes."""
        self._add(TILE, size)
        self._record_working_set()

    def mark(self) -> int:
        """Return the place of what is in use now, for `release`."""
        return len(self._log)

    def release(self, mark: int) -> None:
        """Restore the bytes of a mark."""
        if mark < self._peak_at:
            self._peak_rest = self._log[mark : self._peak_at] + self._peak_rest
            self._peak_at = mark
        for key, size in self._log[mark:]:
            self._count(key, -size)
        del self._log[mark:]

    def _set_peak(self, used_bytes: int) -> None:
        self._peak_bytes, self._peak_at, self._peak_rest = used_bytes, len(self._log), []

    def _add(self, use: str, size: int) -> None:
        key = self.part, use
        self._log.append((key, size))
        self._count(key, size)

    def _count(self, key: tuple[str, str], size: int) -> None:
        self._held[key] += size
        if key[1] == "keys/values":
            self._kept += size

    def _of(self, use: str) -> int:
        return self._held.get((self.part, use), 0)

    def _record_working_set(self) -> None:
        now = {
            TILE: self._of(TILE),
            "workspaces": self._of("workspaces"),
            BETWEEN: sum(self._of(use) for use in ("activations", "keys/values", "messages")),
        }
        most = self.working.get(self.part, {})
        self.working[self.part] = {use: max(now[use], most.get(use, 0)) for use in now}


def _keep_most(kept: dict[str, Uses], part: str, uses: Uses) -> None:
    if sum(uses.values()) > sum(kept.get(part, {}).values()):
        kept[part] = uses
